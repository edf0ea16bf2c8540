"""ONNX files give the same logits in onnxruntime, for any number and length of texts, and know no path from here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lmssl.errors import ExportError
from lmssl.export import onnx_file
from lmssl.export.onnx_file import check_onnx, write_onnx

for package in onnx_file.PACKAGES:
    pytest.importorskip(package)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_of(auto_class: Any, kind: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=128, pad_token_id=0, **sizes)
    return auto_class.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_same_logits(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    auto_class = AutoModelForCausalLM if kind == "llama" else AutoModelForMaskedLM
    model = model_of(auto_class, kind, max_position_embeddings=64, **SIZES)
    assert write_onnx(model, tmp_path / "onnx" / "model.onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    ids = torch.randint(0, 128, (1, 33), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(**inputs).logits, rtol=1e-4, atol=1e-5)
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert not any(path in content for path in (b"site-packages", b".py\n", b"/lmssl/", str(Path.cwd()).encode()))


def test_what_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    model = model_of(AutoModelForCausalLM, "llama", max_position_embeddings=64, **SIZES)
    with pytest.raises(ExportError, match="onnxruntime gives other logits"):
        write_onnx(model, tmp_path / "model.onnx")


def test_what_is_refused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    t5 = model_of(AutoModelForSeq2SeqLM, "t5", d_model=16, d_ff=16, num_layers=1, num_heads=1, d_kv=16)
    with pytest.raises(ExportError, match="a t5 model reads two texts"):
        check_onnx(t5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="takes onnx and onnxscript and onnxruntime"):
        check_onnx(t5)

"""ONNX files give the same logits in onnxruntime, for any number and length of texts, and know no path from here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kinds import PAD, VOCAB, tiny, with_attention
from lmssl.errors import ExportError
from lmssl.export import onnx_file
from lmssl.export.onnx_file import check_onnx, write_onnx

for package in onnx_file.PACKAGES:
    pytest.importorskip(package)

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "modernbert", "roberta", "electra")]


@pytest.mark.parametrize("kind", ["bert", *SLOW])
def test_the_logits_of_stock_attention(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    model = tiny(kind, objective="causal" if kind == "llama" else "masked")  # with our attention, as a run has it
    assert write_onnx(model, tmp_path / "onnx" / "model.onnx") < 1e-4
    assert {part.config._attn_implementation for part in parts(model)} == {"document"}
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    ids = torch.randint(8, VOCAB, (3, 33), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    mask[2, :9] = 0
    inputs = {"input_ids": ids.where(mask.bool(), torch.tensor(PAD)), "attention_mask": mask}
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        wanted = with_attention(model, "eager")(**inputs).logits
    torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert not any(path in content for path in (b"site-packages", b".py\n", b"/lmssl/", str(Path.cwd()).encode()))


def parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


@pytest.mark.slow
def test_a_file_that_ignores_the_mask_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = onnx_file._program

    def with_ours(module: Any, example: Any) -> Any:
        with_attention(module.model, "document")
        return export(module, example)

    monkeypatch.setattr(onnx_file, "_program", with_ours)
    model = tiny("bert")
    with pytest.raises(ExportError, match="onnxruntime gives other logits"):
        write_onnx(model, tmp_path / "model.onnx")
    assert {part.config._attn_implementation for part in parts(model)} == {"document"}


def test_what_is_refused_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    t5 = tiny("t5", objective="span")
    with pytest.raises(ExportError, match="a t5 model reads two texts"):
        check_onnx(t5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="takes onnx and onnxscript and onnxruntime"):
        check_onnx(t5)

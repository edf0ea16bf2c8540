"""What the files of a stock folder hold beyond what transformers 5 writes by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from kinds import tiny
from lmssl.export.stock import write_stock
from lmssl.tokenizer.load import load_tokenizer


@pytest.mark.parametrize("kind", ["t5", "umt5", "mt5"])
def test_version_4_scales_what_version_5_scales(kind: str, root: Path, tmp_path: Path) -> None:
    """Version 4 scales hidden states before a tied output matrix; version 5 does not for mT5, which is tied there."""
    model = tiny(kind, objective="span")
    write_stock(model, load_tokenizer(root / "tokenizer" / "t5-8k"), tmp_path, max_shard_size="5GB")
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is (kind != "mt5")
    assert ("lm_head.weight" in weights) is (kind == "mt5")
    again, said = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert again.lm_head.weight is again.shared.weight
    assert torch.equal(again.shared.weight, model.shared.weight)
    ids = torch.arange(8, 28)[None]
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids[:, :5]).logits for m in (again.eval(), model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

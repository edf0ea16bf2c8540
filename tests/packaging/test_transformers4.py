"""What transformers 5 exports, transformers 4.57 reads equally: logits and token ids, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmssl.export import export_run
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

VERSION_4 = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
# What hub 0.36 imports and hub 2 does not; named with their own needs, because --no-deps must keep torch out.
COMPANIONS = ("requests==2.32.5", "urllib3==2.5.0", "charset-normalizer==3.4.4", "idna==3.11", "certifi")
READ = """
import json, sys
import torch, transformers
from transformers import AutoConfig, AutoTokenizer
masked = AutoConfig.from_pretrained(sys.argv[1]).architectures[0].endswith("ForMaskedLM")
auto_class = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
model, said = auto_class.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(said.values()), said
model.eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=(torch.arange(40)[None] * 7 + 5) % 4000).logits[0]
text = "def naive(x):\\n\\treturn  'a b' + str(12345)  # <|endoftext|> is text here?"
print(json.dumps({
    "version": transformers.__version__,
    "logits": logits.flatten().tolist(),
    "ids": tokenizer(text)["input_ids"],
    "inputs": list(tokenizer(text)),
    "eos": [(getattr(model, "generation_config", None) or model.config).eos_token_id, tokenizer.eos_token_id],
    "mask": tokenizer.mask_token_id,
}))
"""
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500000.0},
    "qwen3": {"kind": "qwen3", "rope_theta": 1000000.0, "num_key_value_heads": 1, "head_dim": 64},
    "gpt2": {"kind": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2},
}
MASKED: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER,
    # Its layers and rotations have other names in the config class of version 4.
    "modernbert": ENCODER | {"local_attention": 8, "global_attn_every_n_layers": 2, "global_rope_theta": 20_000.0},
    "electra": ENCODER | {"embedding_size": 32},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2},
}


@pytest.fixture(scope="module")
def version_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that shadows transformers and its companions; torch and the rest stay those of this environment."""
    folder = tmp_path_factory.mktemp("transformers4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", folder, *VERSION_4, *COMPANIONS], check=True)
    return folder


def read(export: Path, shadow: Path | None) -> dict[str, object]:
    env = dict(os.environ) | ({"PYTHONPATH": str(shadow)} if shadow else {})
    done = subprocess.run(
        [sys.executable, "-c", READ, str(export)], capture_output=True, text=True, check=False, env=env, cwd=export
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("family", MASKED)
def test_both_versions_read_the_same_encoder(family: str, version_4: Path, tmp_path: Path, text_folder: Path) -> None:
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2)
    recipe |= {
        "tokenizer": {"path": "tokenizer/wordpiece-8k"},
        "objective": {"kind": "masked"},
        "model": {"kind": family, **MASKED[family]},
    }
    run = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    export = export_run(run, None, tmp_path / "export", lambda _: None).path
    five, four = read(export, None), read(export, version_4)
    assert four["version"] == "4.57.6"
    assert four["logits"] == pytest.approx(five["logits"], abs=1e-5)
    assert five["mask"] is not None
    assert all(four[name] == five[name] for name in ("ids", "inputs", "mask"))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_versions_read_the_same_model(family: str, version_4: Path, tmp_path: Path, text_folder: Path) -> None:
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2)
    if family == "gpt2":
        recipe["model"] = {}
    recipe["model"] |= FAMILIES[family]
    run = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    export = export_run(run, None, tmp_path / "export", lambda _: None).path
    five, four = read(export, None), read(export, version_4)
    assert str(five["version"]).startswith("5.")
    assert four["version"] == "4.57.6"
    assert four["logits"] == pytest.approx(five["logits"], abs=1e-5)
    assert (four["ids"], four["inputs"], four["eos"]) == (five["ids"], five["inputs"], five["eos"])

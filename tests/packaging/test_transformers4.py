"""What transformers 5 exports, transformers 4.57 reads equally: logits and token ids, in an environment of its own.

One small run of every objective and family is exported, and two processes read all exports, one with each version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmssl.export import ExportWeights, export_run
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

VERSION_4 = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
# What hub 0.36 imports and hub 2 does not; named with their own needs, because --no-deps must keep torch out.
COMPANIONS = ("requests==2.32.5", "urllib3==2.5.0", "charset-normalizer==3.4.4", "idna==3.11", "certifi")
READ = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer
out, found = Path(sys.argv[1]), {"version": transformers.__version__}
autos = {"ForMaskedLM": "MaskedLM", "ForPreTraining": "PreTraining", "ForConditionalGeneration": "Seq2SeqLM"}
text = "def naive(x):\\n\\treturn  'a b' + str(12345)  # <|endoftext|> is text here?"
for folder in sys.argv[2:]:
    name = AutoConfig.from_pretrained(folder).architectures[0]
    auto = next((autos[end] for end in autos if name.endswith(end)), "CausalLM")
    auto = getattr(transformers, "AutoModelFor" + auto)
    model, said = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == name
    assert not any(said.values()), said
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = (torch.arange(40)[None] * 7 + 5) % 4000
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, ::2]} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        output = model(**inputs)
    logits = {key: output[key].contiguous() for key in output if key.endswith("logits")}
    save_file(logits, out / (str(len(found)) + ".safetensors"))
    generation = getattr(model, "generation_config", None) or model.config
    ends = [getattr(generation, key, None) for key in ("eos_token_id", "pad_token_id", "decoder_start_token_id")]
    found[folder] = {
        "class": name,
        "ids": tokenizer(text)["input_ids"],
        "inputs": list(tokenizer(text)),
        "ends": [*ends, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "mask": tokenizer.mask_token_id,
        "length": tokenizer.model_max_length,
    }
(out / "found.json").write_text(json.dumps(found))
"""
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
WORDPIECE, SPANS = {"tokenizer": {"path": "tokenizer/wordpiece-8k"}}, {"tokenizer": {"path": "tokenizer/t5-8k"}}


def masked(kind: str, sizes: dict[str, Any], **objective: Any) -> dict[str, Any]:
    return {**WORDPIECE, "objective": {"kind": "masked", **objective}, "model": {"kind": kind, **sizes}}


def decoder(objective: str = "causal", **model: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    tokenizer = WORDPIECE if objective == "hybrid" else {}
    return {**tokenizer, "objective": {"kind": objective}, "model": {"kind": "llama", **sizes, **model}}


EXPORTS: dict[str, dict[str, Any]] = {
    "llama": decoder(rope_theta=500000.0),
    "bf16-shards": decoder(),
    "qwen3": decoder(kind="qwen3", rope_theta=1000000.0, num_key_value_heads=1, head_dim=64),
    "gpt2": {"model": {"kind": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}},
    "prefix": decoder("prefix"),
    "hybrid": decoder("hybrid"),
    "bert": masked("bert", ENCODER),
    "roberta": masked("roberta", ENCODER),
    # Its layers and rotations have other names in the config class of version 4.
    "modernbert": masked(
        "modernbert",
        ENCODER | {"local_attention": 8, "global_attn_every_n_layers": 2, "global_rope_theta": 20_000.0},
    ),
    "electra": masked("electra", ENCODER | {"embedding_size": 32}),
    "distilbert": masked("distilbert", {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2}),
    "sentences": masked("bert", ENCODER, sentence_task="next"),
    "replaced": {
        **WORDPIECE,
        "objective": {"kind": "replaced"},
        "model": {"kind": "electra", **ENCODER, "embedding_size": 32},
    },
    "t5": {**SPANS, "objective": {"kind": "span"}, "model": {"kind": "t5", **T5}},
    "mt5": {**SPANS, "objective": {"kind": "span"}, "model": {"kind": "mt5", **T5}},
    "umt5": {**SPANS, "objective": {"kind": "span"}, "model": {"kind": "umt5", **T5}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16-shards": {"weights": ExportWeights(dtype="bfloat16"), "max_shard_size": "300KB"}
}
FOLDERS = [*EXPORTS, "replaced/generator"]


@pytest.fixture(scope="module")
def version_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that shadows transformers and its companions; torch and the rest stay those of this environment."""
    folder = tmp_path_factory.mktemp("transformers4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", folder, *VERSION_4, *COMPANIONS], check=True)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A folder of exports, one of each kind."""
    folder = tmp_path_factory.mktemp("exports")
    for name, sections in EXPORTS.items():
        work = tmp_path_factory.mktemp(name)
        recipe = small_recipe(text_folder, work / "run", folder.parent / "cache", steps=2) | sections
        run = train(load_recipe(write_recipe(work / "recipe.yaml", recipe)))
        export_run(run, None, folder / name, lambda _: None, **OPTIONS.get(name, {}))
    assert len(list((folder / "bf16-shards").glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def read(exports: Path, version_4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What each version read: a folder with `found.json`, and logits by number."""
    told = {}
    for number, shadow in ((5, None), (4, version_4)):
        out = told[number] = tmp_path_factory.mktemp(f"version{number}")
        env = dict(os.environ) | ({"PYTHONPATH": str(shadow)} if shadow else {})
        command = [sys.executable, "-c", READ, str(out), *(str(exports / name) for name in FOLDERS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=out)
        assert done.returncode == 0, done.stderr[-3000:]
    return told


@pytest.mark.parametrize("name", FOLDERS)
def test_both_versions_read_the_same(name: str, exports: Path, read: dict[int, Path]) -> None:
    found = {number: json.loads((out / "found.json").read_text()) for number, out in read.items()}
    assert found[5]["version"].startswith("5.")
    assert found[4]["version"] == "4.57.6"
    folder = str(exports / name)
    assert found[4][folder] == found[5][folder]
    place = list(found[5]).index(folder)
    five, four = (load_file(read[number] / f"{place}.safetensors") for number in (5, 4))
    assert five.keys() == four.keys() != set()
    for key in five:
        room = max(1e-5, 1e-6 * float(five[key].abs().max()))  # mT5's logits are not scaled, and reach 50
        torch.testing.assert_close(four[key], five[key], rtol=0, atol=room)


def test_every_objective_is_among_them() -> None:
    from lmssl.recipe.sections import Recipe

    kinds = {sections.get("objective", {"kind": "causal"})["kind"] for sections in EXPORTS.values()}
    schema = Recipe.model_json_schema()["$defs"]
    known = {
        values["properties"]["kind"]["const"]
        for name, values in schema.items()
        if name.endswith("Objective") and "const" in values.get("properties", {}).get("kind", {})
    }
    assert kinds == known

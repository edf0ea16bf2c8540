"""llama.cpp itself reads our GGUF files: its logits and its token ids against those of transformers.

It runs as `cyllama`, whose wheel holds a built llama.cpp, in a folder of its own; llama-cpp-python is sources only.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_models import KINDS, model_of, tokenizer_of
from lmssl.export.gguf_file import check_gguf, write_gguf
from lmssl.export.weights import round_to
from lmssl.tokenizer.extension import extend_tokenizer
from lmssl.tokenizer.load import load_tokenizer

pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PREBUILT = "cyllama==0.2.18"
IDS = [(7 * place + 5) % 4000 for place in range(40)]
READ = """
import json, sys
path, asked, answer = sys.argv[1:]
ids, texts = json.load(open(asked, encoding="utf-8"))
from cyllama.llama import llama_cpp as lib
class Model(lib.LlamaModel):  # get_logits_ith asks for a name that the class lacks
    n_vocab = property(lambda self: self.get_vocab().n_vocab)
settings = lib.LlamaModelParams()
settings.n_gpu_layers = 0
model = Model(path_model=path, params=settings, verbose=False)
settings = lib.LlamaContextParams()
settings.n_ctx = settings.n_batch = 64
settings.n_threads = settings.n_threads_batch = 1
settings.type_k = settings.type_v = settings.flash_attn_type = 0  # keys and values in float32
context = lib.LlamaContext(model=model, params=settings, verbose=False)
batch = lib.LlamaBatch(n_tokens=64, embd=0, n_seq_max=1)
batch.set_batch(ids, n_past=0, logits_all=True)
context.decode(batch)
logits = [list(context.get_logits_ith(place)) for place in range(len(ids))]
vocab = model.get_vocab()
found = [vocab.tokenize(text, True, False) for text in texts]
json.dump([logits, found], open(answer, "w", encoding="utf-8"))
"""
PIECES = (
    "a",
    "B",
    "é",
    "東",
    " ",
    "  ",
    "\n",
    "\t",
    "1",
    "23",
    "'s",
    "'",
    "!",
    "_",
    "\r\n",
    "\u00a0",
    "😀",
    "ſ",
    "\u0300",
)
TEXTS = [
    "Hello world",
    "  two  spaces\n\n\tdef f(x):\n        return x+1234567 # ok",
    "It's we'll I'M they'RE don't I\u2019ll 't 'LL a'sb",
    "naïve café — “quotes” … 東京 日本語 한국어 ไทย Привет ελληνικά",
    "😀👍🏽 emoji \u200d zero \u3000ideographic\u2003em é e\u0301 ﬁ ß ǅ ٣٤٥ Ⅻ ½ ²",
    "a\r\nb\rc\n \n  \n",
    "   ",
    "\n\n\n",
    "x   ",
    "1 12 123 1234 12345.678,90",
    "http://a.b/c?d=e&f=g#h  user@x.org foo_bar.baz(qux)->quux::x;;;!!!???",
    "\x01\x7f control",
    "word" * 50,
    *("".join(random.Random(seed).choices(PIECES, k=30)) for seed in range(60)),
]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """A command that reads a file with llama.cpp, and its environment."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--target", folder, PREBUILT],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No matching distribution" in done.stderr:
        pytest.skip(f"no wheel of {PREBUILT} for this Python and machine, or no index to ask: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return [sys.executable, "-c", READ], dict(os.environ) | {"PYTHONPATH": str(folder)}


def read(llama_cpp: tuple[list[str], dict[str, str]], path: Path, texts: list[str]) -> tuple[torch.Tensor, Any]:
    """Logits [T, V] at every place of IDS, and ids of each text with what llama.cpp puts around it."""
    command, env = llama_cpp
    asked, answer = path.with_suffix(".asked"), path.with_suffix(".answer")
    asked.write_text(json.dumps([IDS, texts]), encoding="utf-8")
    done = subprocess.run([*command, path, asked, answer], capture_output=True, env=env, cwd=path.parent, check=False)
    assert done.returncode == 0, done.stderr[-3000:].decode(errors="replace")
    logits, found = json.loads(answer.read_text(encoding="utf-8"))
    return torch.tensor(logits), found


@pytest.mark.parametrize("name", ["bpe-4k", "bpe-16k"])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_the_same_model(
    kind: str, name: str, llama_cpp: tuple[list[str], dict[str, str]], root: Path, tmp_path: Path
) -> None:
    tokenizer, path = tokenizer_of(root, name), tmp_path / "m.gguf"
    model = model_of(kind, tokenizer.num_tokens + 64)
    write_gguf(model, tokenizer, path, name="m", split=check_gguf(model, tokenizer))
    logits, found = read(llama_cpp, path, TEXTS)
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([IDS])).logits[0]
    # llama.cpp takes gpt2's activation from a table of float16.
    assert float((logits - ours).abs().max()) < (1e-3 if kind == "gpt2" else 1e-5) * float(ours.abs().max())
    assert found == [tokenizer.backend.encode(text).ids for text in TEXTS]
    control = tokenizer.backend.id_to_token(tokenizer.eos_id)
    _, found = read(llama_cpp, path, [f"{control} is text"])
    assert tokenizer.eos_id not in found[0]


def test_biases_grouped_heads_and_rounded_weights(
    llama_cpp: tuple[list[str], dict[str, str]], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path = tokenizer_of(root, "bpe-4k"), tmp_path / "m.gguf"
    monkeypatch.setitem(KINDS, "llama", KINDS["llama"] | {"attention_bias": True, "mlp_bias": True, "head_dim": 16})
    model = model_of("llama", 4161)
    round_to(model, "float16")
    write_gguf(model, tokenizer, path, name="m", split=check_gguf(model, tokenizer))
    round_to(model, "float32")
    logits, _ = read(llama_cpp, path, [])
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([IDS])).logits[0]
    # Its products of float16 weights round the other factor, too.
    assert float((logits - ours).abs().max()) < 5e-3 * float(ours.abs().max())


def test_further_tokens_and_what_stands_around_a_text(
    llama_cpp: tuple[list[str], dict[str, str]], root: Path, tmp_path: Path
) -> None:
    extend_tokenizer(root / "tokenizer" / "bpe-4k", tmp_path / "more", tokens=["naïve", "<tab>"], special=["<|im|>"])
    path = tmp_path / "more" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    bos = content["added_tokens"][0]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["content"]: {"id": bos["content"], "ids": [bos["id"]], "tokens": [bos["content"]]}},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "more")
    model = model_of("qwen3", tokenizer.num_tokens)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", name="m", split=check_gguf(model, tokenizer))
    texts = ["a naïve one<tab>two", "naïvenaïve", "plain"]
    _, found = read(llama_cpp, tmp_path / "m.gguf", texts)
    assert found == [tokenizer.backend.encode(text).ids for text in texts]
    assert all(ids[0] == bos["id"] for ids in found)

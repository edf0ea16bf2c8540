"""Compiled equals eager: the loss module under bfloat16 autocast, at shapes where the head has several chunks.

C++ compilers have miscompiled loops that the compiler writes (see `lmssl.model.head._plus_product`), which shows
neither in the loss nor in float32; gradients of single parameters tell. Each loop costs g++ a second or two, so
models are as small as loops of every form allow, and most cases compile what is around the body alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lmssl.data.batch import SequenceBatch
from lmssl.model import head, products
from lmssl.model.build import build_config, build_model
from lmssl.objective.base import SumObjective
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.recipe.sections import Recipe
from lmssl.shipped import find
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.launch import can_compile, compile_module, set_determinism
from sequences import packed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what the compiler imports
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # as it traces
    pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler"),
]

VOCAB = 8256
"""An odd number of vectors of 64, as BERT's 30,528, so that loops have ends."""
LOGITS_BYTES = 2 * VOCAB * 128
"""Chunks of 256 targets, the fewest; rows make a whole number of them, for another size is as many loops again."""
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("masked", SIZES),
    "modernbert": ("masked", SIZES | {"num_hidden_layers": 2, "local_attention": 64, "global_attn_every_n_layers": 2}),
    "electra": ("replaced", SIZES | {"embedding_size": 64}),
    "llama": ("causal", SIZES),
    "llama, untied": ("causal", SIZES | {"tie_word_embeddings": False}),
    "llama, hybrid": ("hybrid", SIZES),
    "t5": ("span", T5),
}
TOKENIZERS = {"span": "tokenizer/t5-8k"}
MASKS = {"rate": 0.25}  # so many targets of 512 tokens are 128


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(head.LOGITS_BYTES, "cpu", LOGITS_BYTES)
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def leave_out_bodies(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler step over encoders and decoders, and attention run as it is written."""
    monkeypatch.setattr(products, "_compile", lambda function: function)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model:
            part.forward = torch.compiler.disable(part.forward)


def recipe_of(kind: str, objective: str, sizes: dict[str, Any], length: int, rows: int, deterministic: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "compiled",
            "tokenizer": {"path": TOKENIZERS.get(objective, "tokenizer/wordpiece-8k")},
            "data": {"sequence_length": length, "mixture": [{"name": "t", "kind": "text", "path": "t"}]},
            "objective": {"kind": objective, **(MASKS if objective in ("masked", "replaced", "hybrid") else {})},
            "model": {"kind": kind, "vocab_size": VOCAB, **sizes},
            "optim": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "cosine"},
            "train": {
                "tokens": 2**20,
                "batch_tokens": rows * length,
                "micro_batch_sequences": rows,
                "deterministic": deterministic,
            },
        }
    )


def rows_of(length: int, rows: int) -> SequenceBatch:
    """Documents of many lengths, one as long as a row, and padding."""
    random = np.random.default_rng(3)
    packs = [[length]]
    while len(packs) < rows:
        cuts = np.sort(random.choice(np.arange(8, length - 8, 8), size=int(random.integers(1, 6)), replace=False))
        packs.append(np.diff([0, *cuts]).tolist())
    return packed(*packs, length=length, first=110, vocab_size=8000, seed=4)


def trained(module: LossModule, inputs: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    objective = module.objective
    assert isinstance(objective, SumObjective)
    module.zero_grad()
    sums = module(inputs)
    torch.stack([sums[term] for term in objective.weights]).sum().backward()
    found = {name: p.grad.detach().double() for name, p in module.named_parameters() if p.grad is not None}
    return {term: sums[term].item() for term in objective.weights}, found


@pytest.mark.parametrize(
    ("name", "length", "rows", "whole", "deterministic"),
    [
        ("llama", 256, 3, True, True),  # runs on CPU are deterministic
        ("modernbert", 1536, 2, True, True),  # attention goes document by document
        ("llama, untied", 256, 3, False, True),
        ("llama, hybrid", 256, 4, False, True),
        ("bert", 512, 6, False, True),
        ("electra", 512, 6, False, True),
        ("t5", 512, 6, False, True),
        ("bert", 512, 6, False, False),
        ("llama", 256, 3, False, False),
    ],
)
def test_compiled_gradients_are_the_eager_ones(
    name: str, length: int, rows: int, whole: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective_kind, sizes = KINDS[name]
    recipe = recipe_of(name.split(",")[0], objective_kind, sizes, length, rows, deterministic)
    tokenizer = load_tokenizer(find(recipe.tokenizer.path))
    objective = build_objective(recipe, tokenizer, num_positions=1000)
    config = build_config(
        recipe.model, objective=objective_kind, vocab_size=VOCAB, sequence_length=length, tokenizer=tokenizer
    )
    model = build_model(config, objective=objective_kind, seed=1)
    if not whole:
        leave_out_bodies(model, monkeypatch)
    set_determinism(recipe, torch.device("cpu"))
    module = LossModule(model, objective, bf16=True).train()
    micro = objective.prepare(rows_of(length, rows))
    targets = max(micro.counts.values())
    with torch.autocast("cpu", torch.bfloat16):
        assert targets > head.chunk_size(targets, VOCAB)
    wanted, eager = trained(module, micro.inputs)
    compile_module(module, "model")
    got, compiled = trained(module, micro.inputs)
    assert got == pytest.approx(wanted, rel=1e-2)
    assert compiled.keys() == eager.keys()
    norm = torch.stack([gradient.norm() for gradient in eager.values()]).norm()
    apart = {key: (compiled[key] - gradient).norm() for key, gradient in eager.items()}
    wrong = {
        key: f"{apart[key]:.3g} of {gradient.norm():.3g}"
        for key, gradient in eager.items()
        if not apart[key] <= 0.03 * gradient.norm() + 1e-3 * norm
    }
    assert not wrong

"""A compiler or a kernel that is wrong is found before the first update, and training goes on without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from kinds import tiny
from lmssl.data.batch import SequenceBatch
from lmssl.model import fused, native
from lmssl.objective.base import MicroBatch
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.train import opening
from lmssl.train.proof import has_dropout, step_difference
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

pytestmark = pytest.mark.filterwarnings(  # inductor's import
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _default_stance() -> Iterator[None]:
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def micro_batch() -> MicroBatch:
    ids = np.random.default_rng(0).integers(1, 90, (2, 24))
    offsets = np.tile(np.arange(24), (2, 1))
    return CausalObjective().prepare(SequenceBatch(ids, np.ones((2, 24), np.int32), offsets, np.arange(2), np.ones(2)))


def module() -> LossModule:
    return LossModule(tiny("llama", objective="causal"), CausalObjective(), bf16=False).train()


def scaled(factor: float) -> Callable[..., Any]:
    """A compiler of graphs whose results are too large."""

    def compiler(graph: Callable[..., Any], _inputs: Any) -> Any:
        def run(*values: Any) -> list[Any]:
            return [x * factor if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in graph(*values)]

        return make_boxed_func(run)

    return compiler


def plain(graph: Any, _inputs: Any) -> Any:
    return make_boxed_func(graph)


def test_a_right_compiler_is_found_right_and_leaves_no_gradients() -> None:
    ours = module()
    ours.compile(backend="aot_eager", dynamic=False)
    assert step_difference(ours, micro_batch().inputs, {"causal": 1.0}) is None
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_wrong_gradients_are_named(factor: float) -> None:
    ours = module()
    ours.compile(backend=aot_autograd(fw_compiler=plain, bw_compiler=scaled(factor)), dynamic=False)
    found = step_difference(ours, micro_batch().inputs, {"causal": 1.0})
    assert found is not None and found.startswith("a gradient of model.")


def test_a_wrong_loss_is_named() -> None:
    ours = module()
    ours.compile(backend=aot_autograd(fw_compiler=scaled(1.5), bw_compiler=plain), dynamic=False)
    found = step_difference(ours, micro_batch().inputs, {"causal": 1.0})
    assert found is not None and found.startswith("a loss of")


def test_dropout_draws_otherwise_when_compiled() -> None:
    model = tiny("bert", objective="masked")
    assert not has_dropout(model)
    model.config.hidden_dropout_prob = 0.1
    assert has_dropout(model)


def test_a_run_goes_on_without_a_wrong_compiler(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers as without compilation, and a line that says why."""

    def compile_wrongly(core: torch.nn.Module, _mode: str) -> None:
        core.compile(backend=aot_autograd(fw_compiler=plain, bw_compiler=scaled(float("nan"))), dynamic=False)

    changes: dict[str, Any] = {"train.precision": "fp32"}
    eager = small_recipe(text_folder, tmp_path / "eager", tmp_path / "cache", steps=3, **changes)
    train(load_recipe(write_recipe(tmp_path / "eager.yaml", eager)))
    monkeypatch.setattr(opening, "compile_module", compile_wrongly)
    wrong = small_recipe(
        text_folder, tmp_path / "wrong", tmp_path / "cache", steps=3, **changes, **{"train.compile": "model"}
    )
    train(load_recipe(write_recipe(tmp_path / "wrong.yaml", wrong)))
    assert "going on without compilation" in " ".join(capsys.readouterr().out.split())
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("eager", "wrong")]
    assert losses[0] == losses[1]
    assert json.dumps(losses[1]).count("NaN") == 0


DROPPED: dict[str, Any] = {
    "tokenizer": {"path": "tokenizer/wordpiece-8k"},
    "objective": {"kind": "masked"},
    "model": {
        "kind": "bert",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.3,
    },
}


needs_avx2 = pytest.mark.skipif(not native.processor_can(), reason="the processor has no AVX2")
needs_bf16 = pytest.mark.skipif(not native.processor_can(torch.bfloat16), reason="no AVX-512 for bfloat16")


@pytest.mark.parametrize(
    ("piece", "precision", "family"),
    [
        pytest.param("swiglu", "fp32", {}, marks=needs_avx2),
        pytest.param("linear", "bf16", DROPPED, marks=needs_bf16),
    ],
)
def test_a_run_goes_on_without_a_wrong_kernel(
    tmp_path: Path,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    piece: str,
    precision: str,
    family: dict[str, Any],
) -> None:
    """The same numbers as without kernels, and a line that says why; with dropout, which the proof leaves as it was."""
    function = getattr(fused, piece)
    for name, kernels, factor in (("torch", "off", 1.0), ("wrong", "on", 1.2), ("right", "on", 1.0)):
        monkeypatch.setattr(fused, piece, lambda *given, factor=factor: factor * function(*given))
        changes = {"train.precision": precision, "train.compile": "off", "train.kernels": kernels, **family}
        recipe = small_recipe(text_folder, tmp_path / name, tmp_path / "cache", steps=3, **changes)
        train(load_recipe(write_recipe(tmp_path / f"{name}.yaml", recipe)))
        said = " ".join(capsys.readouterr().out.split())
        assert ("the step by our own kernels is wrong" in said) == (name == "wrong")
        assert native.in_use() == (name == "right")
    losses = {name: [row["loss"] for row in metrics(tmp_path / name)] for name in ("torch", "wrong", "right")}
    assert losses["wrong"] == losses["torch"] != losses["right"]
    assert losses["right"] == pytest.approx(losses["torch"], rel=2e-3 if precision == "bf16" else 2e-6)

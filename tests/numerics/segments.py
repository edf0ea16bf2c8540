"""Trains several runs one after another in the processes of one launch, each under a backend of its own: for tests.

`torchrun segments.py PLAN`, where PLAN is a JSON file: a list of `{"backend": .., "recipe": PATH}`. Every run is opened
and closed as by itself; what is shared is the start of Python, which takes longer than the steps of a small model. With
`"exact": true` nothing is trained: what the backend would save is compared with what it has loaded. With `"hash": PATH`
nothing is trained either: the hash of all weights as opened is written there. With `"disturb": true` the first step is
preceded by one that is dropped half way, and by one whose update is not made. `"bad": [p, ..]` are positions with whose
text a loss is no number, or with `"factor": F` so often itself.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from faulty_runs import bad_text
from launched_runs import weights_hash
from lmssl import checkpoint
from lmssl.objective.base import MicroBatch
from lmssl.recipe.load import load_recipe
from lmssl.train import loop
from lmssl.train.backend import Backend
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session
from lmssl.train.run import train
from lmssl.train.step import Measured, train_step

ENVIRONMENT: dict[str, dict[str, str]] = {"ddp": {"ACCELERATE_USE_CPU": "true"}}
ENVIRONMENT["fsdp2"] = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ENVIRONMENT["hsdp"] = ENVIRONMENT["fsdp2"] | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
for stage in "123":
    ENVIRONMENT[f"zero{stage}"] = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    }
    ENVIRONMENT[f"zero{stage}-offload"] = ENVIRONMENT[f"zero{stage}"] | {
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu" if stage == "3" else "none",
    }
"""What `accelerate launch` sets for each of recipes/launch."""


def pretend_devices() -> None:
    """Have accelerate drive FSDP2 over gloo, as it drives it over NCCL; see fsdp_cpu.py."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["_cpu"] = False


def compare(recipe: Path) -> None:
    """Open a run, and have each rank compare what it would write with the checkpoint that was loaded."""
    loaded = load_recipe(recipe).recipe
    lock = RunLock(Path(loaded.out_path))
    session = open_session(loaded, print, lock=lock)
    found = checkpoint.find_latest(session.run, print)
    assert found is not None
    owned = session.backend.owned_tensors()
    for group, tensors in owned.items():
        saved = found.tensors(group)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, saved[name]), f"{name} differs"
        everybody = torch.tensor(len(tensors), device=session.accelerator.device)
        num_tensors = int(session.backend.reduce(everybody))
        assert num_tensors == len(saved) > 0, f"{num_tensors} of {len(saved)} tensors of {group}"
    session.saver.close()
    session.backend.close()
    lock.release()


@contextmanager
def disturbed() -> Iterator[None]:
    """Before the first step, begin it and drop it, and make it without its update: neither may leave a trace."""
    first = [True]

    def step(
        backend: Backend, objective: Any, micro_batches: Sequence[MicroBatch], **arguments: Any
    ) -> Measured | None:
        inputs = [{k: v.to(backend.accelerator.device) for k, v in m.inputs.items()} for m in micro_batches]
        if first:
            first.clear()
            backend.backward(1000 * _loss(backend, inputs[0], last=False), last=False)
            backend.drop_gradients()
            for index, part in enumerate(inputs):
                last = index == len(inputs) - 1
                backend.backward(_loss(backend, part, last=last), last=last)
            backend.clip(1.0)
            assert float(backend.update(torch.zeros((), device=backend.accelerator.device))) == 0.0
        return train_step(backend, objective, micro_batches, **arguments)

    loop.train_step = step  # type: ignore[assignment]
    try:
        yield
    finally:
        loop.train_step = train_step


def _loss(backend: Backend, inputs: dict[str, torch.Tensor], *, last: bool) -> torch.Tensor:
    return next(iter(backend.forward(inputs, last=last).values()))


def run_segment(
    backend: str,
    recipe: Path,
    *,
    exact: bool = False,
    hash: str = "",
    disturb: bool = False,
    bad: Sequence[int] = (),
    factor: float = math.nan,
) -> None:
    """Train one run to its end, or compare what it loads, as a fresh launch would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    environment = dict(os.environ)
    os.environ.update(ENVIRONMENT[backend])
    try:
        if backend in ("fsdp2", "hsdp"):
            pretend_devices()
        if exact:
            compare(recipe)
        elif hash:
            found = weights_hash(recipe)
            Path(f"{hash}-{os.environ['RANK']}").write_text(found, encoding="utf-8")
        else:
            with disturbed() if disturb else nullcontext(), bad_text(bad, factor):
                train(load_recipe(recipe))
    finally:
        os.environ.clear()
        os.environ.update(environment)


if __name__ == "__main__":
    # A run ends the processes' connections; a second start through the same launcher would find the old addresses.
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    for segment in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        options = {name: value for name, value in segment.items() if name not in ("backend", "recipe")}
        run_segment(segment["backend"], Path(segment["recipe"]), **options)
        print(f"{segment['recipe']}: done under {segment['backend']}", flush=True)

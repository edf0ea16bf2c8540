"""`lmssl train` that counts what its collectives move: `python counted_training.py OUT.json RECIPE`, under a launcher.

Every operation of torch's process groups passes torch's dispatcher, those of DDP's reducer in C++ too; a dispatch mode
around each step reads their sizes. Bytes are what one rank has to send at least for such an operation: where S bytes
are the larger of what goes in and what comes out, 2 (n - 1) / n S among n ranks for a sum that all get, (n - 1) / n S
for a gathering, a scattering or a sum that one rank gets. The first rank writes the last step's calls and bytes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmssl.cli import main as lmssl
from lmssl.train import loop

_SILENT = ("barrier", "wait_tensor", "monitored_barrier")


class Volume(TorchDispatchMode):
    """Calls and bytes of collectives by operation."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.num_ranks = num_ranks
        self.calls: dict[str, int] = {}
        self.sent_bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = func._schema.name.partition("::")[2].strip("_")
            if not name.startswith(_SILENT):
                whole = max(_bytes(args), _bytes(result))
                self.calls[name] = self.calls.get(name, 0) + 1
                self.sent_bytes[name] = self.sent_bytes.get(name, 0.0) + _share(name, self.num_ranks) * whole
        return result


def _share(name: str, ranks: int) -> float:
    if name.startswith(("send", "recv")):
        return float(name.startswith("send"))
    return (ranks - 1) / ranks * (2 if name.startswith(("allreduce", "all_reduce")) else 1)


def _bytes(value: Any) -> int:
    """The largest of several tensors' or lists' sizes: what goes in and what comes out stand side by side."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list):  # several tensors that are moved together
        return sum(map(_bytes, value))
    if isinstance(value, tuple):
        return max(map(_bytes, value), default=0)
    return 0


def count(out: Path) -> None:
    """Put the counting around every step."""
    plain = loop.train_step

    def counted(backend: Any, *args: Any, **kwargs: Any) -> Any:
        ranks = backend.accelerator.num_processes
        with Volume(ranks) as volume:
            measured = plain(backend, *args, **kwargs)
        if backend.accelerator.is_main_process:
            row = {"ranks": ranks, "parameters": backend.num_parameters, "calls": volume.calls}
            out.write_text(json.dumps(row | {"sent_bytes": volume.sent_bytes}), encoding="utf-8")
        return measured

    loop.train_step = counted


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate refuses it without devices, torch does not
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["_cpu"] = False
    count(Path(sys.argv.pop(1)))
    sys.argv.insert(1, "train")
    sys.exit(lmssl())

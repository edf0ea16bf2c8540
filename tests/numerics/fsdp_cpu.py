"""Starts `lmssl` under FSDP2 on CPU, where accelerate refuses it: for tests only, as `torchrun fsdp_cpu.py train ...`.

accelerate takes processes on CPU for `MULTI_CPU`, under which it ignores a launch file's FSDP and would let them train
apart. Told that they have devices, it drives FSDP2 over gloo as it would over NCCL.
"""

from __future__ import annotations

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from lmssl.cli import main

if __name__ == "__main__":
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["_cpu"] = False
    sys.exit(main())

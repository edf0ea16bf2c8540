"""Rows under fully sharded weights score as under whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from lmssl.evaluate.score import Row, score_rows
from lmssl.evaluate.subject import open_subject
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule

class Whole:
    device, num_processes, process_index = torch.device("cpu"), 1, 0

class Shared:
    def __init__(self):
        self.device, self.num_processes, self.process_index = Whole.device, dist.get_world_size(), dist.get_rank()
    def reduce(self, tensor, how):
        dist.all_reduce(tensor)
        return tensor

dist.init_process_group("gloo")
for path, causal in ((sys.argv[1], True), (sys.argv[2], False)):
    model = open_subject(Path(path)).model
    draws = np.random.default_rng(0)
    rows = [
        Row(draws.integers(10, 4000, n), np.arange(2, n), draws.integers(10, 4000, n - 2))
        for n in draws.integers(3, 30, 21)
    ]
    whole = score_rows(model, rows, Whole(), causal=causal, batch_tokens=50)
    module = LossModule(model, CausalObjective(), bf16=False)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers if causal else model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    shared = score_rows(module, rows, Shared(), causal=causal, batch_tokens=50)
    np.testing.assert_allclose(shared.nats, whole.nats, rtol=1e-6)
    assert (shared.num_right == whole.num_right).all() and (whole.nats > 0).all()
dist.barrier()
dist.destroy_process_group()
print("EQUAL")
"""


@pytest.mark.slow
def test_sharded_weights_score_as_whole_ones(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), str(folder("llama")), str(folder("bert"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("EQUAL") == 2

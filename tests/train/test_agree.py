"""Ranks that ask each other: the same answers at the same call, whoever was asked to stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from faulty_runs import free_port
from lmssl.train.agree import Agreement

RANKS = """
import datetime, os, sys
import torch.distributed as dist
from lmssl.train.agree import Agreement

rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120))
call = 0
wants_stop, elapsed = lambda: rank == 1 and call >= 3, lambda: 100.0 * rank + call
agreement = Agreement(wants_stop, elapsed, rank=rank, num_ranks=2, seconds=-1.0)
found = []
for call in range(6):
    found.append((agreement.poll(), agreement.seconds))
agreement.close()
print(found, agreement.stopping, agreement.seconds)
dist.destroy_process_group()
"""


def test_alone_the_answer_is_immediate() -> None:
    asked = [False]
    agreement = Agreement(lambda: asked[0], lambda: 7.5, seconds=2.0)
    assert (agreement.stopping, agreement.seconds) == (False, 2.0)
    assert not agreement.poll()
    asked[0] = True
    assert agreement.poll()
    assert agreement.stopping
    assert agreement.seconds == 7.5
    agreement.close()


def test_two_ranks_agree_one_call_later_and_take_the_clock_of_rank_0(tmp_path: Path) -> None:
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    first, second = (rank.communicate(timeout=240)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert first == second
    answers = [(False, -1.0), *((call - 1 >= 3, float(call - 1)) for call in range(1, 6))]
    assert first.strip() == f"{answers} True 5.0"

"""Below `train` nothing reads the environment, the clock, the rank or a global random state; nowhere a pickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
DATES = {"now", "utcnow", "today"}
SEEDED_NUMPY = {"default_rng", "Generator", "SeedSequence", "Philox", "PCG64", "PCG64DXSM", "BitGenerator"}
TORCH_DRAWS = {
    "manual_seed", "seed", "initial_seed", "get_rng_state", "set_rng_state", "rand", "randn", "randint", "randperm",
    "bernoulli", "multinomial", "normal", "rand_like", "randn_like", "randint_like",
}  # fmt: skip
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
TORCH_PICKLES = {"torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}
# Kinds of things that are arguments.
DISTRIBUTED_TYPES = {
    *("distributed.ProcessGroup", "distributed.tensor.DTensor"),
    *("distributed.tensor.Replicate", "distributed.tensor.Shard"),
}
# "module name" -> why it may.
ALLOWED = {
    "lmssl.model.build torch.random.fork_rng": "transformers draws weights from the global state; it is put back",
    "lmssl.optim.exchange torch.distributed.all_gather_into_tensor": "over a group that is an argument",
    "lmssl.optim.exchange torch.distributed.all_to_all_single": "over a group that is an argument",
    "lmssl.model.build torch.manual_seed": "inside that fork, with the recipe's seed",
    "lmssl.model.continued torch.random.fork_rng": "transformers draws weights that it then reads; it is put back",
    "lmssl.evaluate.generate torch.random.fork_rng": "transformers draws tokens from the global state; it is put back",
    "lmssl.evaluate.generate torch.manual_seed": "inside that fork, with the caller's seed",
}


def impure(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything read that should have been an argument."""
    names = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            full = _full_name(node, names)
            if full and _is_banned(full):
                yield node.lineno, full
        if isinstance(node, ast.Call):
            full = _full_name(node.func, names) or ""
            seeded = any(keyword.arg == "generator" for keyword in node.keywords)
            if full.startswith("torch.") and full.removeprefix("torch.") in TORCH_DRAWS and not seeded:
                yield node.lineno, full


def _is_banned(full: str) -> bool:
    library, _, name = full.partition(".")
    match library:
        case "os":
            return name in {"environ", "environb", "getenv", "getenvb"}
        case "time":
            return name in CLOCKS
        case "datetime":
            return name.rpartition(".")[2] in DATES
        case "random":
            return name not in {"", "Random"}
        case "numpy":
            return name.startswith("random.") and name.split(".")[1] not in SEEDED_NUMPY
        case "torch":
            return name.startswith(("distributed.", "random.")) and name not in DISTRIBUTED_TYPES
        case "accelerate":
            return name in {"PartialState", "state.PartialState", "state.AcceleratorState"}
    return False


def pickles(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of what writes or reads pickles, which run code of whoever wrote them."""
    names = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, name) for name in modules if name.partition(".")[0] in PICKLERS)
        if isinstance(node, ast.Attribute | ast.Name) and (full := _full_name(node, names)) in TORCH_PICKLES:
            yield node.lineno, str(full)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle"


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        left = _full_name(node.value, names)
        return left and f"{left}.{node.attr}"
    return None


def test_below_train_everything_is_an_argument(sources: list[Any], layers: list[list[str]]) -> None:
    order = [room for rooms in layers for room in rooms]
    below = set(order[order.index("train") + 1 :])
    wrong, used = [], set()
    for source in sources:
        for line, name in impure(source.tree) if source.room in below else ():
            if (key := f"{source.module} {name}") in ALLOWED:
                used.add(key)
            else:
                wrong.append(f"{source.path}:{line}: {name}")
    assert wrong == []
    assert used == set(ALLOWED), "exceptions nobody needs any more"


def test_the_rule_sees_impure_source() -> None:
    bad = """
import os, time, random
import numpy as np
import torch
import torch.distributed as dist
from datetime import datetime
from time import perf_counter as clock
a = os.environ["RANK"], os.getenv("HOME")
b = time.time(), clock(), datetime.now()
c = random.random(), np.random.rand(3)
d = torch.rand(3), torch.manual_seed(1), torch.randperm(4, generator=g)
e = dist.get_rank(), torch.distributed.get_world_size()
f = random.Random(1), np.random.Generator(np.random.Philox(key=1)), os.path.join("a", "b")
"""
    found = sorted({name for _, name in impure(ast.parse(bad))})
    assert found == [
        "datetime.datetime.now",
        "numpy.random.rand",
        "os.environ",
        "os.getenv",
        "random.random",
        "time.perf_counter",
        "time.time",
        "torch.distributed.get_rank",
        "torch.distributed.get_world_size",
        "torch.manual_seed",
        "torch.rand",
    ]


def test_nothing_is_pickled(sources: list[Any]) -> None:
    assert [f"{source.path}:{line}: {name}" for source in sources for line, name in pickles(source.tree)] == []


def test_the_rule_sees_pickles() -> None:
    bad = """
import pickle, numpy as np, torch as t
from torch import save
from joblib.externals import cloudpickle
a = t.load("x"), np.load("x", allow_pickle=True), np.load("x", allow_pickle=False)
save(1, "x")
t.save_everything, model.load("x")
"""
    found = sorted(name for _, name in pickles(ast.parse(bad)))
    assert found == ["allow_pickle", "joblib.externals", "pickle", "torch.load", "torch.save"]

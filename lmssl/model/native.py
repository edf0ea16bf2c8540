"""The C++ kernels of `cpp/`, for CPUs with AMX: built once on the machine, then loaded.

`kernels.py` makes operators of them. They are used in training steps under bf16 autocast, compiled or not; anywhere
else, and where there is no compiler, torch's and its compiler's own remain.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = (
    *("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx512bf16", "-mfma", "-mf16c"),
)
_loaded: ctypes.CDLL | None = None
_aside = False


class BuildError(Exception):
    """What the C++ compiler said."""


def processor_can() -> bool:
    """Whether this processor has the instructions that the kernels are written for, and Linux runs on it.

    Not of those that multiply bf16 without AMX: what torch's small products want of their operands there was not tried.
    """
    return sys.platform == "linux" and torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_amx_tile_supported()


def load(compiler: str = "g++", cache_folder: Path | None = None) -> bool:
    """Build the kernels if this version of them is not there yet, and use them from now on; False: not this processor.

    Args:
        compiler: of C++, a command.
        cache_folder: where what was built is kept; None: `~/.cache/lmssl`.
    Raises:
        BuildError: the compiler fails, or there is none.
    """
    global _loaded, _aside
    _aside = False
    if _loaded is None and processor_can():
        library = library_file(compiler, cache_folder)
        if not library.exists():
            _build(compiler, sorted(_SOURCES.glob("*.cpp")), library)
        _loaded = ctypes.CDLL(str(library))
    return _loaded is not None


@cache
def library_file(compiler: str = "g++", cache_folder: Path | None = None) -> Path:
    """Where this version of the kernels is, or will be, for this version of torch and this compiler; see `load`."""
    told = hashlib.sha256(f"{torch.__version__} {compiler} {_FLAGS}".encode())
    for source in sorted(_SOURCES.iterdir()):
        told.update(source.read_bytes())
    return _writable(cache_folder or Path.home() / ".cache" / "lmssl") / f"kernels-{told.hexdigest()[:16]}.so"


def _writable(folder: Path) -> Path:
    """The folder, or one of this process alone where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        private = tempfile.mkdtemp(prefix="lmssl-")
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return Path(private)


def _build(compiler: str, sources: list[Path], library: Path) -> None:
    if shutil.which(compiler) is None:
        raise BuildError(f"there is no {compiler}")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *_FLAGS, f"-I{torch_folder / 'include'}", *map(str, sources), "-o", str(made)]
        command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise BuildError((ended.stderr.strip() or f"exit status {ended.returncode}").splitlines()[-1])
        os.replace(made, library)  # several processes may build at once, each a whole file


def set_aside() -> None:
    """Use them no more, until they are loaded again."""
    global _aside
    _aside = True


@contextmanager
def without() -> Iterator[None]:
    """Compute as if they were not there."""
    global _aside
    before, _aside = _aside, True
    try:
        yield
    finally:
        _aside = before


def in_use() -> bool:
    """Whether they are loaded, and not set aside."""
    return _loaded is not None and not _aside


def applies() -> bool:
    """Whether they are in use for what is computed here: gradients are recorded, products on CPU made in bfloat16."""
    rounded = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return in_use() and rounded and torch.is_grad_enabled()


def kernel(name: str) -> Any:
    """A function of the library; its last argument is the number of threads."""
    assert _loaded is not None, "operators are reached where kernels are in use, and those are loaded"
    return getattr(_loaded, name)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where its numbers are; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """An array of C."""
    return (ctypes.c_int64 * len(values))(*values)


def threads() -> ctypes.c_int32:
    """How many torch works with."""
    return ctypes.c_int32(torch.get_num_threads())

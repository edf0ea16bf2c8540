"""The C++ kernels of `cpp/`, for x86 CPUs with AVX2 or more: built once on the machine, then loaded.

`kernels.py` makes operators of them. They are used in training steps, compiled or not, in float32 and, where the
processor has instructions for it, under bf16 autocast; anywhere else, and where there is no compiler, torch's and its
compiler's own remain.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512")
_LIBRARIES = ("-ltorch_cpu", "-lc10")
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    "AVX512": _AVX512,
    "AVX512 with bfloat16": (*_AVX512, "-mavx512bf16"),
}
"""Flags of the compiler, by what torch calls a processor; kernels for bfloat16 are built for the last one only."""
_loaded: ctypes.CDLL | None = None
_types: tuple[torch.dtype, ...] = ()
_aside = False


class BuildError(Exception):
    """What the C++ compiler said."""


def processor_can(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this processor has the instructions that the kernels for a type are written for, and Linux runs on it."""
    if dtype == torch.bfloat16:
        return _instructions() == "AVX512 with bfloat16"
    return dtype == torch.float32 and _instructions() is not None


def _instructions() -> str | None:
    found = torch.backends.cpu.get_cpu_capability()  # less than the processor's where ATEN_CPU_CAPABILITY says so
    if sys.platform != "linux" or found not in _INSTRUCTIONS:
        return None
    return f"{found} with bfloat16" if found == "AVX512" and torch.cpu._is_avx512_bf16_supported() else found


def load(compiler: str = "g++", cache_folder: Path | None = None) -> bool:
    """Build the kernels if this version of them is not there yet, and use them from now on; False: not this processor.

    Args:
        compiler: of C++, a command.
        cache_folder: where what was built is kept; None: `~/.cache/lmssl`.
    Raises:
        BuildError: the compiler fails, or there is none.
    """
    global _loaded, _types, _aside
    _aside = False
    if _loaded is None and processor_can():
        library = library_file(compiler, cache_folder)
        if not library.exists():
            _build(compiler, sorted(_SOURCES.glob("*.cpp")), library)
        _loaded = ctypes.CDLL(str(library))
        _types = tuple(dtype for dtype in (torch.float32, torch.bfloat16) if processor_can(dtype))
    return _loaded is not None


@cache
def library_file(compiler: str = "g++", cache_folder: Path | None = None) -> Path:
    """Where this version of the kernels is, or will be, for this version of torch and this compiler; see `load`."""
    told = hashlib.sha256(f"{torch.__version__} {compiler} {_FLAGS} {_instructions()}".encode())
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
    flags = (*_FLAGS, *_INSTRUCTIONS[_instructions() or "AVX2"], f"-I{torch_folder / 'include'}")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made, objects = Path(scratch) / library.name, [f"{scratch}/{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(len(sources)) as pool:
            parts = [(compiler, *flags, "-c", str(a), "-o", b) for a, b in zip(sources, objects, strict=True)]
            list(pool.map(_finish, parts))
        _finish((compiler, "-shared", "-fopenmp", *objects, "-o", str(made), f"-L{torch_folder / 'lib'}", *_LIBRARIES))
        os.replace(made, library)  # several processes may build at once, each a whole file


def _finish(command: tuple[str, ...]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise BuildError((ended.stderr.strip() or f"exit status {ended.returncode}").splitlines()[-1])


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
    """Whether they are in use for what is computed here: gradients are recorded, and products have a type they know."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return in_use() and torch.is_grad_enabled() and dtype in _types


def takes(tensor: Tensor) -> bool:
    """Whether they are in use, and know the type of a tensor."""
    return in_use() and tensor.device.type == "cpu" and tensor.dtype in _types


def kernel(name: str, dtype: torch.dtype | None = None) -> Any:
    """A function of the library, for a type of products if it depends on that; its last argument: how many threads."""
    assert _loaded is not None, "operators are reached where kernels are in use, and those are loaded"
    return getattr(_loaded, name if dtype is None else f"{name}_{str(dtype).removeprefix('torch.')}")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where its numbers are; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """An array of C."""
    return (ctypes.c_int64 * len(values))(*values)


def threads() -> ctypes.c_int32:
    """How many torch works with."""
    return ctypes.c_int32(torch.get_num_threads())

"""Building the kernels: once, into a cache, or an error that says what the compiler said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lmssl.model import native
from lmssl.train.launch import load_kernels

pytestmark = pytest.mark.skipif(not native.processor_can(), reason="the processor has no AVX2")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, with an empty cache."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library_file.cache_clear()
    yield
    native.library_file.cache_clear()


def test_a_run_builds_them_and_the_next_one_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    load_kernels(nn.Linear(2, 2), said.append)
    assert said == ["building kernels for this processor, once, in about 7 s"]
    assert native.in_use()
    (built,) = (tmp_path / "cache/lmssl").iterdir()
    assert built == native.library_file("g++", tmp_path / "cache/lmssl")
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built again"))
    load_kernels(nn.Linear(2, 2), said.append)
    assert len(said) == 1 and native.in_use()


def test_another_version_of_torch_or_compiler_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {native.library_file(compiler, tmp_path) for compiler in ("g++", "clang++", "g++")}
    native.library_file.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert len(found | {native.library_file("g++", tmp_path)}) == 3


def test_what_the_compiler_says_is_told_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'cc1plus: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    for path, words in (
        (str(compiler), "cc1plus: no space left"),
        ("no-such-compiler", "there is no no-such-compiler"),
    ):
        monkeypatch.setenv("CXX", path)
        said: list[str] = []
        load_kernels(nn.Linear(2, 2), said.append)
        assert not native.in_use()
        assert said[-1] == f"kernels for this processor cannot be built, torch's are used, which are slower: {words}"
    assert not list((tmp_path / "cache/lmssl").glob("*"))


def test_where_home_cannot_be_written_they_are_built_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = native.library_file("g++", tmp_path / "file/lmssl")
    assert tmp_path not in found.parents and found.parent.is_dir()


def test_a_processor_without_the_instructions_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not any(native.processor_can(dtype) for dtype in (torch.float32, torch.bfloat16))
    said: list[str] = []
    load_kernels(nn.Linear(2, 2), said.append)
    assert not said and not native.in_use() and not (tmp_path / "cache").exists()


def test_what_a_processor_has_decides_which_types_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types, files = (torch.float32, torch.bfloat16, torch.float16, torch.float64), set()
    for capability, bfloat16, expected in (
        ("AVX2", True, [True, False, False, False]),
        ("AVX512", False, [True, False, False, False]),
        ("AVX512", True, [True, True, False, False]),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=bfloat16: found)
        assert [native.processor_can(dtype) for dtype in types] == expected
        native.library_file.cache_clear()
        files.add(native.library_file("g++", tmp_path))
    assert len(files) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="they are built for AVX2 anyway")
def test_built_for_avx2_they_compute_the_same() -> None:
    """All tests of kernels once more, in a process that is told that the processor has no more than that."""
    tests = Path(__file__).with_name("test_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(tests)]
    environment = dict(os.environ) | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tests.parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout

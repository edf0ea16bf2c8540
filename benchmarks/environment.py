"""Environments of the peers, each made on its first use from files in `benchmarks/peers`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def peers_python(name: str = "") -> Path:
    """Python of an environment in `.venvs`, with what `peers/requirements[-NAME].txt` asks for.

    Versions are those of constraints.txt. What `requirements[-NAME]-alone.txt` lists is installed without what it
    asks for, which is older torch, numpy or transformers than its code needs.
    """
    suffix = f"-{name}" if name else ""
    folder = HERE.parent / ".venvs" / f"peers{suffix}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(HERE.parent / "constraints.txt")]
        subprocess.run([*install, "-r", str(HERE / "peers" / f"requirements{suffix}.txt")], check=True)
        alone = HERE / "peers" / f"requirements{suffix}-alone.txt"
        subprocess.run([*install, "--no-deps", "-r", str(alone)], check=True)
        done.touch()  # last, so that an interrupted installation is repeated
    return python

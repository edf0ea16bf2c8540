"""The built wheel, installed into an environment of its own, does what the checkout does."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import lmssl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, so that both are proven whole."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, root], check=True, capture_output=True
    )
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment with the wheel; the dependencies are this environment's own."""
    home = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    # Appended, hence searched last, and without its .pth files: the editable checkout stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", home, "install", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*pip, "--disable-pip-version-check", wheel], check=True, capture_output=True)
    return home / "bin"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A working directory with nothing in it, and beside it an empty home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def _run(command: list[str | Path], cwd: Path) -> str:
    kept = {
        name: os.environ[name] for name in ("PATH", "LANG", "HF_HUB_OFFLINE", "OMP_NUM_THREADS") if name in os.environ
    }
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**kept, "HOME": str(cwd.parent / "home")}
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_wheel_holds_package_recipes_and_tokenizers(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("lmssl-")}
    expected = {path.relative_to(root).as_posix() for path in (root / "lmssl").rglob("*") if path.is_file()}
    for folder in ("recipes", "tokenizer"):
        expected |= {
            f"lmssl/_shipped/{p.relative_to(root).as_posix()}" for p in (root / folder).rglob("*") if p.is_file()
        }
    assert names == {name for name in expected if "__pycache__" not in name}


def test_version_and_show(bin_folder: Path, empty: Path) -> None:
    assert lmssl.__version__ in _run([bin_folder / "lmssl", "--version"], empty)
    where = "import lmssl; print(lmssl.__file__)"
    assert _run([bin_folder / "python", "-c", where], empty).startswith(str(bin_folder.parent))
    assert "gpt-llama" in _run([bin_folder / "lmssl", "show", "recipes/debug/gpt-llama.yaml"], empty)


def test_demo_in_an_empty_folder(bin_folder: Path, empty: Path) -> None:
    _run([bin_folder / "lmssl", "demo"], empty)
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "prompt = tokenizer('The', return_tensors='pt')\n"
        "ids = model.generate(**prompt, min_new_tokens=8, max_new_tokens=8, do_sample=False)\n"
        "assert ids.shape == (1, prompt['input_ids'].shape[1] + 8), ids.shape\n"
        "assert 'lmssl' not in sys.modules\n"
        "print(*ids[0].tolist())\n"
    )
    export = empty / "runs" / "demo" / "export"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in export.iterdir()}
    assert len(_run([sys.executable, "-c", code, export], empty).split()) > 8

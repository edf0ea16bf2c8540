from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lmssl
from lmssl import cli
from lmssl.errors import Preempted, RecipeError

DEBUG = "recipes/debug/gpt-llama.yaml"
VERBS = ("demo", "tokenizer", "train", "show", "data", "schema", "export", "push")


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMSSL_DEBUG", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmssl", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert all(verb in out for verb in VERBS)
    for verb in VERBS:
        code, out, _ = run(capsys, verb, "--help")
        assert code == 0 and "Usage: lmssl" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"lmssl {lmssl.__version__}\n", "")


def test_the_module_is_the_command(root: Path) -> None:
    result = process("--version", cwd=root)
    assert (result.returncode, result.stdout) == (0, f"lmssl {lmssl.__version__}\n")


@pytest.mark.parametrize(
    ("verb", "default"),
    [("demo", "the first free one"), ("prepare", "all, divided"), ("data", "1, or the step"), ("export", "RUN/export")],
)
def test_help_shows_defaults_in_brackets(capsys: pytest.CaptureFixture[str], verb: str, default: str) -> None:
    """Brackets are markup where help is printed: unescaped, they and what they hold would be missing."""
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0 and f"[default: {default}" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [["--help"], ["show", DEBUG], ["show", DEBUG, "--json"], ["schema"]])
def test_quick_verbs_import_nothing_heavy(root: Path, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lmssl.cli import main\n"
        f"code = main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(code or (f'imports {sorted(heavy)}' if heavy else 0))\n"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    # Half a second on an idle core; torch alone would take longer than this on a busy one.
    assert time.monotonic() - started < 5


def test_show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "show", DEBUG, "optim.lr=1e-3", "seed=3")
    assert (code, err) == (0, "")
    assert "0.001" in out and "override" in out and "1,311,872" in out
    code, out, _ = run(capsys, "show", DEBUG, "--json", "optim.lr=1e-3")
    assert code == 0 and json.loads(out)["recipe"]["optim"]["lr"] == 1e-3
    code, out, _ = run(capsys, "show", DEBUG, "--model")
    assert code == 0 and "equal to the formula" in out


def test_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0 and json.loads(out)["title"] == "lmssl recipe"
    assert run(capsys, "schema", "--out", str(tmp_path / "s.json")) == (0, "", "")
    assert (tmp_path / "s.json").read_text(encoding="utf-8") == out
    code, _, err = run(capsys, "schema", "--out", str(tmp_path / "none" / "s.json"))
    assert code == 1 and "cannot be written" in err and "choose another --out" in err


def test_mistakes_are_told_in_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", DEBUG, "optim.lrr=3")
    assert (code, out) == (2, "")
    assert err == (
        "error: there is no key optim.lrr\n  where:  override optim.lrr=3\n  remedy: did you mean optim.lr?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "what", "remedy"),
    [
        (["trian"], "no such command 'trian'", "did you mean 'train'?"),
        (["zzz"], "no such command 'zzz'", "see `lmssl --help`"),
        (["show"], "missing argument 'RECIPE'", "see `lmssl show --help`"),
        (["show", DEBUG, "--modle"], "no such option: --modle", "did you mean --model?"),
        (["show", DEBUG, "--optim.lr=3"], "no such option: --optim.lr", "overrides have no dashes: optim.lr=VALUE"),
        (["export", "runs/x", "--step", "two"], "invalid value for '--step'", "see `lmssl export --help`"),
        (["show", "recipes/debug/none.yaml"], "there is no such recipe", ""),
        (["train", DEBUG, "lr"], "an override needs a `=`", "write lr=VALUE"),
        (["tokenizer", "none.yaml"], "there is no such recipe", ""),
    ],
)
def test_wrong_command_lines_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], what: str, remedy: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {what}")
    assert f"remedy: {remedy}" in err


def _replace_show(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("lmssl.recipe.load.load_recipe", fail)


@pytest.mark.parametrize("debug", ["--debug", "LMSSL_DEBUG"])
def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, debug: str
) -> None:
    _replace_show(monkeypatch, RecipeError("wrong", where="here", remedy="right"))
    assert "Traceback" not in run(capsys, "show", DEBUG)[2]
    if debug == "LMSSL_DEBUG":
        monkeypatch.setenv(debug, "1")
        code, _, err = run(capsys, "show", DEBUG)
    else:
        code, _, err = run(capsys, "show", DEBUG, debug)
    assert code == 2
    assert "Traceback" in err and "RecipeError: wrong" in err
    monkeypatch.setenv("LMSSL_DEBUG", "0")
    assert "Traceback" not in run(capsys, "show", DEBUG)[2]


def test_interruptions_end_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_show(monkeypatch, KeyboardInterrupt())
    assert run(capsys, "show", DEBUG) == (130, "", "interrupted: by the keyboard\n")
    assert "Traceback" in run(capsys, "show", DEBUG, "--debug")[2]


def test_an_interruption_that_a_library_made_another_error_of_ends_in_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError("too\n deep") from None

    monkeypatch.setattr("lmssl.recipe.load.load_recipe", interrupted)
    before = signal.getsignal(signal.SIGINT)
    line = "interrupted: by the keyboard; then RecursionError: too deep (--debug shows where)\n"
    assert run(capsys, "show", DEBUG) == (130, "", line)
    assert signal.getsignal(signal.SIGINT) is before
    _replace_show(monkeypatch, RecursionError())
    with pytest.raises(RecursionError):  # one of our own
        run(capsys, "show", DEBUG)


def test_a_preempted_run_has_stopped_and_not_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace_show(monkeypatch, Preempted("saved at step 3", remedy="run the same command to continue"))
    code, _, err = run(capsys, "show", DEBUG)
    assert code == 75 and err.startswith("stopped: saved at step 3\n")


def test_other_ranks_say_who_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "show", DEBUG, "lr=1")[2].startswith("[rank 1] error: there is no key lr")


def test_errors_are_red_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(capsys, "show", DEBUG, "lr=1")[2].startswith("\x1b[31m\x1b[1merror:\x1b[0m ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(capsys, "show", DEBUG, "lr=1")[2].startswith("error: ")


def test_a_reader_that_leaves_is_no_error(root: Path) -> None:
    command = f'"{sys.executable}" -m lmssl show {DEBUG}; echo "code $?" >&2'
    result = subprocess.run(["bash", "-c", f"({command}) | true"], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stderr == f"code {cli.BROKEN_PIPE}\n"


def test_train_hands_the_loaded_recipe_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import lmssl.train.run

    seen: list[Any] = []
    monkeypatch.setattr(lmssl.train.run, "train", lambda loaded, _launcher: seen.append(loaded) or Path("x"))
    assert run(capsys, "train", DEBUG, "seed=7")[0] == 0
    assert seen[0].recipe.seed == 7
    assert seen[0].origins["seed"].kind == "override"


def test_export_and_demo_hand_their_arguments_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmssl.demo
    import lmssl.export

    seen: list[Any] = []
    monkeypatch.setattr(lmssl.export, "export_run", lambda *given, weights, **_: seen.append((*given, weights)))
    monkeypatch.setattr(lmssl.demo, "run_demo", lambda *given: seen.append(given))
    assert run(capsys, "export", "runs/x")[0] == 0
    assert run(capsys, "export", "runs/x", "--step", "3", "--out", "y")[0] == 0
    assert run(capsys, "export", "runs/x", "--ema")[0] == 0
    assert run(capsys, "demo")[0] == 0
    assert run(capsys, "demo", "--out", "z")[0] == 0
    assert seen == [
        (Path("runs/x"), None, Path("runs/x/export"), lmssl.export.ExportWeights()),
        (Path("runs/x"), 3, Path("y"), lmssl.export.ExportWeights()),
        (Path("runs/x"), None, Path("runs/x/export-ema"), lmssl.export.ExportWeights(ema=True)),
        (None,),
        (Path("z"),),
    ]


BUILD = """\
name: tiny
licence: made up for a test
kind: bpe
objective: causal
vocab_size: 300
mixture:
  - {name: a, kind: text, path: "text/*.txt"}
"""


def test_tokenizer_trains_and_says_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat and the rat sat on the cat\n" * 200)
    (tmp_path / "build.yaml").write_text(BUILD)
    code, out, err = run(capsys, "tokenizer", "build.yaml", "vocab_size=270")
    assert (code, err) == (0, "")
    assert out == "tokenizer/tiny: 320 tokens\n"
    assert (tmp_path / "tokenizer" / "tiny" / "tokenizer.json").is_file()
    code, out, _ = run(capsys, "tokenizer", "build.yaml", "vocab_size=270", "--out", "here")
    assert code == 0 and out.startswith("here: ")
    code, _, err = run(capsys, "tokenizer", "build.yaml", "vocab_sise=270")
    assert code == 2 and "did you mean vocab_size?" in err


@pytest.mark.parametrize("arguments", [["show", "recipes/demo.yaml"], ["--help"]])
def test_output_on_a_full_disk_is_one_clear_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lmssl", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nothing more can be written: No space left on device")
    assert "remedy:" in done.stderr
    assert "Traceback" not in done.stderr

"""Every command, recipe and link in the documentation is real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lmssl import errors
from lmssl.cli import app
from lmssl.errors import LmsslError
from lmssl.recipe.load import load_recipe

FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def documents(root: Path) -> list[Path]:
    """The pages a reader meets."""
    return [
        *sorted(root.glob("*.md")),
        *sorted((root / "docs").glob("*.md")),
        *sorted((root / "recipes").rglob("*.md")),
    ]


def commands(text: str) -> Iterator[str]:
    """Command lines of console and bash blocks, continuations joined; a console block marks its own by `$`."""
    for language, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language in ("console", "bash") else ():
            if line.startswith("$ "):
                yield line[2:].strip()
            elif language == "bash" and line.strip() and not line.startswith("#"):
                yield line.strip()


def arguments(command: str) -> list[str] | None:
    """What follows `lmssl` or a launcher's `-m lmssl`; None: the command is another program's."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[:1] == ["lmssl"]:
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1 : words.index("-m") + 2] == ["lmssl"]:
        return words[words.index("-m") + 2 :]
    return None


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Verb and parameters as the command line reads them, without running it.

    Raises:
        Exception: the command line's own usage error.
    """
    group = typer.main.get_command(app)
    try:
        context = group.make_context("lmssl", list(words))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        return name, command.make_context(name, rest, parent=context).params
    except typer.Exit:  # --help, --version
        return "", {}


def _every_command(root: Path) -> list[tuple[Path, str]]:
    return [(page, line) for page in documents(root) for line in commands(page.read_text(encoding="utf-8"))]


def test_lmssl_commands_parse(root: Path) -> None:
    wrong, seen = [], 0
    for page, line in _every_command(root):
        words = arguments(line)
        if words is None:
            continue
        seen += 1
        try:
            parse(words)
        except Exception as error:
            wrong.append(f"{page.name}: {line}: {error}")
    assert wrong == []
    assert seen >= 3


def test_shipped_recipes_in_commands_accept_their_overrides(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    wrong = []
    for page, line in _every_command(root):
        words = arguments(line) or []
        for index, word in enumerate(words):
            if word.startswith("recipes/") and word.endswith(".yaml"):
                overrides = [w for w in words[index + 1 :] if re.match(r"[a-z_]+(\.\w+)*=", w)]
                try:
                    load_recipe(Path(word), overrides)
                except LmsslError as error:
                    wrong.append(f"{page.name}: {line}: {error}")
    assert wrong == []


def test_make_targets_exist(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.M))
    for page, line in _every_command(root):
        if re.match(r"make\b", line):
            named = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
            assert set(named) <= targets, f"{page.name}: {line}"


def test_recipes_in_the_documentation_load(root: Path, tmp_path: Path) -> None:
    whole = [
        (page, block)
        for page in documents(root)
        for language, block in FENCE.findall(page.read_text(encoding="utf-8"))
        if language == "yaml" and block.startswith("name:")
    ]
    assert whole
    for index, (_page, block) in enumerate(whole):
        path = tmp_path / f"{index}.yaml"
        path.write_text(block, encoding="utf-8")
        load_recipe(path)


def test_links_lead_somewhere(root: Path) -> None:
    wrong = []
    for page in documents(root):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(root)}: {target}")
    assert wrong == []


def test_pages_named_in_source_exist(root: Path, sources: list[Any]) -> None:
    named = {page for source in sources for page in re.findall(r"docs/[\w-]+\.md", source.text)}
    assert [page for page in sorted(named) if not (root / page).exists()] == []


@pytest.mark.parametrize(
    ("page", "own"),
    [("export", {6, 7, 9}), ("evaluate", {2, 10}), ("finetune", {2, 3, 5, 7})],
    ids=lambda value: str(value),
)
def test_exit_codes_are_those_of_errors(page: str, own: set[int], root: Path) -> None:
    known = {found.exit_code for found in vars(errors).values() if isinstance(found, type)}
    text = (root / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| exit code \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, flags=re.M)
    codes = [int(line.split("|")[1]) for line in table.splitlines()]
    assert codes == sorted(set(codes))
    assert own <= set(codes) <= known


def test_commands_are_found_and_bad_ones_refused() -> None:
    text = (
        "```console\n$ FOO=1 lmssl train a.yaml \\\n  b=c  # why\nstep 1\n```\n```bash\ntorchrun -m lmssl show x\n```\n"
    )
    first, second = commands(text)
    assert arguments(first) == ["train", "a.yaml", "b=c"]
    assert arguments(second) == ["show", "x"]
    assert arguments("make test") is None
    assert parse(["show", "recipes/debug/gpt-llama.yaml"])[0] == "show"
    for bad in (["shwo"], ["show", "--no-such-option"], ["show"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(bad)

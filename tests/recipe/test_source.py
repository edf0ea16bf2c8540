from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import RecipeError
from lmssl.recipe.source import MAX_BYTES, MAX_DEPTH, Origin, Source, dotted, read_file, read_text

Refusal = Callable[..., RecipeError]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3e8", 3e8),
        ("3E8", 3e8),
        ("300_000_000", 300_000_000),
        ("-7", -7),
        ("+7", 7),
        ("0", 0),
        ("0o17", 15),
        ("0x1f", 31),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("!!str 12", "12"),
        ("1.2.3", "1.2.3"),
        ("_1", "_1"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: Any) -> None:
    read = read_text(f"key: {text}", "x.yaml").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_float() -> None:
    assert read_text("a: .nan", "x").data["a"] != read_text("a: .nan", "x").data["a"]


def test_every_key_and_item_has_its_line() -> None:
    source = read_text("# note\na:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n", "x.yaml")
    lines = {dotted(path): origin.mark for path, origin in source.origins.items()}
    assert lines == {"a": 2, "a.b": 3, "a.c": 4, "a.c.0": 5, "a.c.1": 6, "a.c.1.d": 6}
    assert source.where(("a", "b", "unknown")) == "x.yaml, line 3"
    assert source.where(("z",)) == "x.yaml"


def test_anchors_are_copied_with_the_line_of_use() -> None:
    source = read_text("a: &x {b: [1]}\nc: *x\n", "x.yaml")
    assert source.data["c"] == {"b": [1]}
    assert source.data["c"] is not source.data["a"]
    assert source.origins[("c", "b", "0")] == Origin("file", 2)


@pytest.mark.parametrize(
    ("text", "what", "where", "remedy"),
    [
        ("", "empty", "x.yaml", "start from a shipped one"),
        ("# only a note\n", "empty", "x.yaml", "shipped"),
        ("---\n", "empty", "x.yaml", "shipped"),
        ("- 1\n", "this is a list", "x.yaml", "key: value"),
        ("just text\n", "this is a single value", "x.yaml", "key: value"),
        ("a: 1\nb: 2\na: 3\n", "a is given twice, on lines 1 and 3", "x.yaml, line 3", "keep one"),
        ("s: {k: 1, k: 2}\n", "s.k is given twice, on line 1", "line 1", "keep one"),
        ("a: 010\n", "`010` is 10 to some readers", "line 1", "write 10 for the number, or '010'"),
        ("a: {<<: {b: 1}}\n", "merge keys", "line 1", "write the keys out"),
        ("1: a\n", "`1` stands where the name of a key should", "line 1", "plain words"),
        ("[1]: a\n", "a mapping or list stands where", "line 1", "plain words"),
        (
            "a: !!python/object:os.system x\n",
            "tag tag:yaml.org,2002:python/object:os.system",
            "line 1",
            "remove the tag",
        ),
        ("a: !mine {b: 1}\n", "tag !mine", "line 1", "remove the tag"),
        ("a: *x\n", "`*x` names an anchor", "line 1", "in quotes"),
        ("a: &x [*x]\n", "`*x` names an anchor", "line 1", "in quotes"),
        ("a: *.txt\n", "", "line 1", "in quotes"),
        ("a: 1\n--- \nb: 2\n", "second document", "line 2", "remove the line `---`"),
        ("a: 1\nb: [1, 2\n", "not YAML", "line", "`[` on this line has no `]`"),
        ("a: 1\n\tb: 2\n", "not YAML", "line 2", "spaces"),
        ("a: 'x\nb: 1\n", "not YAML", "line", "quot"),
        ("a: @x\n", "not YAML", "line 1", "begins with @ in quotes"),
        ("a: b: c\n", "not YAML", "line 1", "holds `: ` in quotes"),
        ("a: 1\n  b: 2\n", "not YAML", "line 2", "look at the line above"),
        ("a:\n  b: 1\n   c: 2\n", "not YAML", "line 3", "look at the line above"),
        ("a:\n   b: 1\n  c: 2\n", "not YAML", "line 3", "indentation"),
        ("a: {b: 1\nc: 2\n", "not YAML", "line 1", "`{` on this line has no `}`"),
        ("a: \x07\n", "may not stand in YAML", "line 1", "in quotes as an escape"),
        ("a: " + "9" * 5000 + "\n", "5000 digits is out of range", "line 1", "number"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_place(text: str, what: str, where: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_text(text, "x.yaml")
    assert what in caught.value.what
    assert where in str(caught.value.where)
    assert remedy in str(caught.value.remedy)


def bomb(levels: int, copies: int) -> str:
    lines = ["a0: &a0 [1]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * copies)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (bomb(30, 9), "more than 20000 values"),
        (bomb(200, 1), f"deeper than {MAX_DEPTH} levels"),
        ("a: " + "[" * 5000, f"deeper than {MAX_DEPTH} levels"),
        ("a: [" + "0," * 21_000 + "0]", "more than 20000 values"),
    ],
)
def test_bombs_end_quickly(text: str, what: str) -> None:
    started = time.monotonic()
    with pytest.raises(RecipeError, match=what):
        read_text(text, "x.yaml")
    assert time.monotonic() - started < 20


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "gpt-llama.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError, match="no such recipe") as near:
        read_file(tmp_path / "gpt-lama.yaml")
    assert near.value.remedy == f"did you mean {tmp_path / 'gpt-llama.yaml'}?"
    with pytest.raises(RecipeError) as far:
        read_file(tmp_path / "0")
    assert "gpt-llama.yaml" in str(far.value.remedy)
    with pytest.raises(RecipeError) as nowhere:
        read_file(tmp_path / "none" / "x.yaml")
    assert "check the path" in str(nowhere.value.remedy)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a folder, not a recipe"):
        read_file(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        read_file(tmp_path / ("x" * 300))
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match=f"the limit is {MAX_BYTES}"):
        read_file(big)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: x\nout: é\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8: byte 0xe9") as caught:
        read_file(latin)
    assert str(caught.value.where).endswith("latin.yaml, line 2")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert read_file(path).data == {"name": "x"}


def test_forgetting_a_section_forgets_what_is_in_it() -> None:
    source = Source("x", {}, {("a",): Origin("default"), ("a", "b"): Origin("default"), ("ab",): Origin("default")})
    source.forget(("a",))
    assert list(source.origins) == [("ab",)]

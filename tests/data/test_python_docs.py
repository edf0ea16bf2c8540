import sys
from pathlib import Path

import pytest

from lmssl.data import python_docs
from lmssl.data.corpus import list_units
from lmssl.data.records import BadRecord, Record
from lmssl.errors import DataError
from lmssl.recipe.data import PythonDocsCorpus

LONG = "This sentence is here to make the docstring long enough to be worth reading: eighty characters."


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(python_docs, "library_folder", lambda: str(tmp_path))
    return tmp_path


def test_docstrings_carry_their_names(library: Path) -> None:
    path = library / "pack" / "__init__.py"
    path.parent.mkdir()
    path.write_text(
        f'"""{LONG}"""\nraise SystemExit("imported")\n'
        f'class A:\n    """short"""\n    def f(self):\n        """{LONG}\n\n        More."""\n'
        f'if True:\n    async def g():\n        """{LONG}"""\n'
    )
    found = [item for item in python_docs.read_docs(str(path)) if isinstance(item, Record)]
    assert [(item.start, item.text) for item in found] == [
        (1, f"pack\n\n{LONG}\n"),
        (5, f"pack.A.f\n\n{LONG}\n\nMore.\n"),
        (10, f"pack.g\n\n{LONG}\n"),
    ]


def test_topics_are_documents(library: Path) -> None:
    path = library / "pydoc_data" / "topics.py"
    path.parent.mkdir()
    path.write_text("# generated\ntopics = {'assert': 'The \"assert\" statement',\n 'for': 'a ' 'loop'}\n")
    assert [item.text for item in python_docs.read_docs(str(path)) if isinstance(item, Record)] == [
        'The "assert" statement',
        "a loop",
    ]
    assert python_docs.num_text_bytes(str(path)) == path.stat().st_size


def test_a_file_that_is_not_python(library: Path) -> None:
    (library / "a.py").write_text("print 'two'")
    (bad,) = python_docs.read_docs(str(library / "a.py"))
    assert isinstance(bad, BadRecord) and bad.reason.startswith("not Python")


def test_tests_and_caches_are_skipped(library: Path) -> None:
    for name in (
        "b.py",
        "a.py",
        "test/a.py",
        "c/test/a.py",
        "c/d.py",
        "idlelib/a.py",
        "site-packages/a.py",
        "c/readme",
    ):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).touch()
    assert [str(Path(path).relative_to(library)) for path in python_docs.list_files()] == ["a.py", "b.py", "c/d.py"]


def test_a_python_without_sources(library: Path) -> None:
    with pytest.raises(DataError, match="no standard library sources"):
        python_docs.list_files()


def test_this_python_has_a_library_of_docs() -> None:
    units = list_units(PythonDocsCorpus(name="docs", kind="python_docs"))
    assert 1 < len(units) < 50
    path = next(path for path in python_docs.list_files() if path.endswith("/json/__init__.py"))
    names = [item.text.split("\n")[0] for item in python_docs.read_docs(path) if isinstance(item, Record)]
    assert names == ["json", "json.dump", "json.dumps", "json.load", "json.loads"]
    assert sys.version_info >= (3, 11)

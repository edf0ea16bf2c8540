from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from lmssl.data.statistics import Statistics
from lmssl.errors import LmsslError
from lmssl.statistics_view import check_page, print_statistics, write_page

NOVELS = Statistics(
    num_documents=1234,
    num_tokens=7000,
    num_bytes=21000,
    num_tokens_with_bytes=7000,
    num_sequences=115,
    num_padding_tokens=360,
    num_cut_documents=7,
    num_dropped_short=3,
    num_dropped_overlaps=2,
    histogram=(0, 0, 900, 334),
)
MADE = Statistics(num_documents=50, num_tokens=3000, num_sequences=50, histogram=(0, 0, 0, 50))


class Page(HTMLParser):
    """Text and elements of a page; every element that is opened must be closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert self.tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.tags.append(tag)
        self.texts.setdefault(tag, "")

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.tags:
            self.texts[tag] += data


def terminal(found: dict[str, Statistics]) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    print_statistics(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("found", [{"novels": NOVELS}, {"novels": NOVELS, "made": MADE, "total": MADE}])
def test_page_and_terminal_are_one_view(tmp_path: Path, found: dict[str, Statistics]) -> None:
    path = tmp_path / "page.html"
    write_page(found, "a <b> {c} & d", path)
    raw = path.read_text(encoding="utf-8")
    page = Page(raw)
    lines = [line.rstrip() for line in page.texts["pre"].splitlines()]
    assert lines == [line.rstrip() for line in terminal(found).splitlines()]
    assert page.texts["title"] == page.texts["h1"] == "a <b> {c} & d"
    assert raw.startswith("<!DOCTYPE html>") and '<meta charset="utf-8">' in raw
    assert not {"script", "link", "img", "iframe"} & page.texts.keys() and not {"src", "href"} & page.attributes
    assert "url(" not in raw and "@import" not in raw
    assert "\x1b" not in raw and sorted(tmp_path.iterdir()) == [path]


def test_the_numbers_stand_in_their_rows() -> None:
    found = {"novels": NOVELS, "made": MADE}
    rows = {line[:20].strip(): line[20:].split() for line in terminal(found).split("\n\n")[0].splitlines()}
    assert rows["first epoch"] == ["novels", "made", "total"]
    assert rows["documents"] == ["1,234", "50", "1,284"]
    assert rows["tokens"] == ["7,000", "3,000", "10,000"]
    assert rows["bytes of text"] == ["21,000", "unknown", "21,000"]
    assert rows["bytes per token"] == ["3.000", "unknown", "3.000"]
    assert rows["padding"] == ["4.891%", "0.000%", "3.475%"]
    assert rows["cut documents"] == ["7", "(0.57%)", "0", "(0.00%)", "7", "(0.55%)"]
    assert rows["dropped documents"] == ["5", "0", "5"]
    assert (rows["too short"], rows["evaluation text"]) == (["3", "0", "3"], ["2", "0", "2"])


def test_every_corpus_has_its_histogram() -> None:
    _, *histograms = terminal({"novels": NOVELS, "made": MADE}).split("\n\n")
    assert [text.splitlines()[0].split(", ")[1] for text in histograms] == ["novels", "made", "total"]
    assert "4 - 7  " + "█" * 15 + " 334" in histograms[0] and "2 - 3  " + "█" * 40 + " 900" in histograms[0]
    assert histograms[1].splitlines()[1:] == [" 4 - 7  " + "█" * 40 + " 50"]
    assert terminal({"none": Statistics()}).count("\n\n") == 0


def test_an_older_page_is_replaced_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "old.html")
    check_page(tmp_path / "link.html")
    assert (tmp_path / "old.html").read_text() == "old"
    write_page({"made": MADE}, "new", tmp_path / "link.html")
    assert "<title>new</title>" in (tmp_path / "old.html").read_text() and (tmp_path / "link.html").is_symlink()


def test_paths_that_take_no_page(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path, "it is not a file"), (tmp_path / "none" / "a.html", "No such file or directory")):
        with pytest.raises(LmsslError, match=why) as caught:
            check_page(path)
        assert caught.value.where == str(path) and caught.value.remedy == "choose another --html"
    with pytest.raises(LmsslError, match="Not a directory"):
        check_page(tmp_path / "file" / "a.html")
    with pytest.raises(LmsslError, match="No such file or directory"):
        write_page({"made": MADE}, "title", tmp_path / "none" / "a.html")

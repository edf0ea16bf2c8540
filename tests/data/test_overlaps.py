import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmssl.data.overlaps import (
    EvaluationText,
    Overlap,
    dropped_overlaps,
    normalised,
    read_evaluation_text,
)
from lmssl.data.stream import SequenceStream
from lmssl.errors import DataError
from lmssl.recipe.data import DecontaminateSection, JsonlCorpus, TokensCorpus

Open = Callable[..., SequenceStream]
TEXT = "Seven brave sailors, on a small boat, crossed the wide sea and found an island of glass."


def test_normalisation() -> None:
    assert normalised("Don't STOP_me, «été» 3.14 — now!\n") == ["dont", "stopme", "été", "314", "now"]
    assert normalised("... !!") == []


@given(st.text(st.one_of(st.characters(max_codepoint=0x2100), st.characters(exclude_categories=["Cs"])), max_size=30))
def test_normalisation_keeps_letters_digits_and_space(text: str) -> None:
    kept = "".join(c for c in text.lower() if c.isalnum() or c.isspace())
    assert normalised(text) == kept.split()


def brute(evaluation: list[str], text: str, ngram: int) -> set[str]:
    """The n-grams, or whole short texts, of evaluation documents that a text contains."""

    def grams(words: list[str], n: int) -> set[str]:
        return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}

    words, found = normalised(text), set()
    for sought in map(normalised, evaluation):
        n = ngram if len(sought) >= ngram else len(sought)
        if n >= min(5, ngram):
            found |= grams(words, n) & grams(sought, n)
    return found


DOCUMENTS = st.lists(st.text("ab ,", max_size=40), max_size=5)


@given(DOCUMENTS, DOCUMENTS, st.integers(3, 8))
def test_the_documents_found_are_those_of_a_plain_search(evaluation: list[str], texts: list[str], ngram: int) -> None:
    found = {overlap.document: overlap.words for overlap in EvaluationText(evaluation, ngram).find(texts)}
    expected = {i: shared for i, text in enumerate(texts) if (shared := brute(evaluation, text, ngram))}
    assert found.keys() == expected.keys()
    assert all(words in expected[i] for i, words in found.items())


def test_the_first_words_in_common_are_named() -> None:
    evaluation = EvaluationText([TEXT], 5)
    text = "so SEVEN brave sailors on a (small) ship, and found an island of glass"
    assert evaluation.find(["nothing", text]) == [Overlap(1, "seven brave sailors on a")]
    assert evaluation.find([]) == []


def test_ngrams_do_not_cross_documents() -> None:
    first, second = "one two three four five six", "seven eight nine ten eleven twelve"
    evaluation = EvaluationText([first, second], 6)
    assert evaluation.find([f"{first} {second}"])
    assert EvaluationText([f"{first} {second}"], 7).find([first, second]) == []
    assert evaluation.find(["four five six seven eight nine", "one two three", "four five six"]) == []


def test_short_evaluation_documents() -> None:
    evaluation = EvaluationText(["a b c d", "a b c d e", " ", "f g h i j k"], 13)
    assert (evaluation.num_documents, evaluation.num_ignored) == (3, 1)
    texts = ["x a b c d y", "x a b c d e y", "f g h i j", "F. g! h i j k"]
    assert [overlap.document for overlap in evaluation.find(texts)] == [1, 3]


def test_the_fingerprint_is_that_of_the_words() -> None:
    prints = [EvaluationText(*arguments).fingerprint for arguments in (([TEXT], 13), ([TEXT.upper()], 13))]
    others = [EvaluationText(*arguments).fingerprint for arguments in (([TEXT], 12), ([TEXT + " more"], 13), ([], 13))]
    assert prints[0] == prints[1] and len({*prints, *others}) == 4


@pytest.fixture
def evaluation(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write texts to a file and give the recipe's section for it."""

    def build(*texts: str, name: str = "evals/a.jsonl", **fields: Any) -> dict[str, Any]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts) if ".jsonl" in name else "\n".join(texts)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        return {"decontaminate": {"path": str(path), **fields}}

    return build


@pytest.fixture
def planted(tmp_path: Path, texts: Any) -> JsonlCorpus:
    """400 documents, every 40th of which quotes the evaluation text."""
    lines = [f"{text} {TEXT if i % 40 == 7 else ''} {text}" for i, text in enumerate(texts(400))]
    path = tmp_path / "planted.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return JsonlCorpus(name="planted", kind="jsonl", path=str(path))


def kept(stream: SequenceStream) -> int:
    """Documents of the first epoch; none of them may hold the planted text."""
    count = 0
    for _, window in stream.first_epoch("planted"):
        count += window.num_documents
        for chunk, row in zip(window._chunk_of.tolist(), window._rows.tolist(), strict=True):
            source = window._chunks[chunk].documents()[row]
            with open(window._chunks[chunk].meta.sources[0], "rb") as file:
                file.seek(int(source["start"]))
                assert TEXT not in json.loads(file.readline())["text"]
    return count


@pytest.mark.parametrize("warm", [False, True])
def test_planted_text_is_found_dropped_counted_and_written_down(
    open_stream: Open, planted: JsonlCorpus, evaluation: Any, tmp_path: Path, warm: bool
) -> None:
    before: dict[Path, int] = {}
    if warm:  # the tokens of a cache from before are not built again
        open_stream(planted, validation=None).num_sequences_per_epoch()
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("tokens.ds")}
        assert before
    stream = open_stream(planted, validation=None, filters=evaluation(TEXT))
    assert kept(stream) == 390
    assert stream.totals().num_dropped_overlaps == 10
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    lines = [
        json.loads(line)
        for path in (tmp_path / "cache").rglob("overlap-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == 10
    records = Path(str(planted.path)).read_bytes()
    for line in lines:
        assert (line["corpus"], line["file"]) == ("planted", planted.path)
        assert TEXT in json.loads(records[line["start"] :].splitlines()[0])["text"]
        assert line["words"] in " ".join(normalised(TEXT)) and len(line["words"].split()) == 13


def test_a_unit_of_many_chunks_is_compared_chunk_by_chunk(
    open_stream: Open, planted: JsonlCorpus, evaluation: Any, tmp_path: Path
) -> None:
    packed = tmp_path / "planted.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(str(planted.path)).read_bytes()))
    corpus = planted.model_copy(update={"path": str(packed)})
    open_stream(corpus, validation=None).sequence(40)  # some of its chunks are in the cache
    stream = open_stream(corpus, validation=None, filters=evaluation(TEXT))
    windows = list(stream.first_epoch("planted"))
    entries = stream.ledger.entries("planted")[: len(windows)]
    assert sum(entry.num_chunks for entry in entries) > 10
    assert sum(window.num_documents for _, window in windows) == 390
    assert sum(entry.num_dropped_overlaps for entry in entries) == 10
    columns = sorted((tmp_path / "cache").rglob("overlap-*.npy"))
    assert len(columns) == len(list((tmp_path / "cache").rglob("tokens.ds")))


def test_held_out_documents_are_neither_dropped_nor_counted(
    open_stream: Open, planted: JsonlCorpus, evaluation: Any
) -> None:
    split = {"ratio": 0.5, "tokens": 10**6}
    stream = open_stream(planted, validation=split, filters=evaluation(TEXT))
    (found,), (plain,) = stream.validation(), open_stream(planted, validation=split).validation()
    assert found.num_tokens == plain.num_tokens
    assert kept(stream) + stream.totals().num_dropped_overlaps + found.window.num_documents == 400
    assert 0 < stream.totals().num_dropped_overlaps < 10


def test_an_overlap_is_counted_as_nothing_else(open_stream: Open, planted: JsonlCorpus, evaluation: Any) -> None:
    filters = {**evaluation(TEXT), "min_tokens": 10**5, "drop_duplicates": True}
    with pytest.raises(DataError, match="drops every document"):
        stream = open_stream(planted, validation=None, filters=filters)
        stream.sequence(0)
    filters["min_tokens"] = 100
    stream = open_stream(planted, validation=None, filters=filters)
    count = kept(stream)
    totals = stream.totals()
    assert totals.num_dropped_overlaps == 10 and count + totals.num_dropped_short == 390


def test_files_are_found_by_glob_and_kind(open_stream: Open, planted: JsonlCorpus, evaluation: Any) -> None:
    evaluation("nothing of the kind is to be found in any of the other documents here")
    evaluation(TEXT, name="evals/b.jsonl.gz")
    path = evaluation("first line", "in the middle " + TEXT, name="evals/c.txt")["decontaminate"]["path"]
    lines: list[str] = []
    for pattern, count in (("a*", 0), ("b*", 10), ("c.txt", 10), ("*", 10)):
        section = {"decontaminate": {"path": str(Path(path).parent / pattern)}}
        stream = open_stream(planted, validation=None, filters=section, report=lines.append)
        kept_count = sum(window.num_documents for _, window in stream.first_epoch("planted"))
        assert kept_count == 400 - count
    assert lines == []


def test_changed_evaluation_text_under_a_ledger(open_stream: Open, planted: JsonlCorpus, evaluation: Any) -> None:
    ledger = open_stream(planted, filters=evaluation(TEXT)).ledger
    with pytest.raises(DataError, match=r"text of data.filters.decontaminate decides the order of the data"):
        open_stream(planted, filters=evaluation(TEXT, "another text of more than four words"), ledger=ledger)
    with pytest.raises(DataError, match=r"text of data.filters.decontaminate decides the order of the data"):
        open_stream(planted, ledger=ledger)


def test_a_damaged_column_is_written_again(
    open_stream: Open, planted: JsonlCorpus, evaluation: Any, tmp_path: Path
) -> None:
    filters = evaluation(TEXT)
    stream = open_stream(planted, validation=None, filters=filters)
    stream.sequence(0)
    _, plan = stream.locate(0)
    column = next(plan.chunks[0].glob("overlap-*.npy"))
    column.write_bytes(column.read_bytes()[:-30])
    fresh = open_stream(planted, validation=None, filters=filters, ledger=stream.ledger)
    fresh.sequence(0)
    column.unlink()
    with pytest.raises(DataError, match="removed or damaged during the run") as caught:
        stream._windows._windows.clear()
        stream.sequence(0)
    assert caught.value.where == str(column)


def test_what_a_chunk_drops_is_told_without_its_held_out_documents(
    open_stream: Open, planted: JsonlCorpus, evaluation: Any
) -> None:
    stream = open_stream(planted, validation={"ratio": 0.5, "tokens": 10**6}, filters=evaluation(TEXT))
    column, told = stream.layout.filters.overlap_column, []
    assert column is not None
    for _, window in stream.first_epoch("planted"):
        for chunk in window.chunks:
            told += dropped_overlaps(chunk, column, stream.layout.seed, stream.layout.held_out_ratio)
    assert len(told) == stream.totals().num_dropped_overlaps in range(1, 10)
    records = Path(str(planted.path)).read_bytes()
    for row in told:
        assert row.keys() == {"file", "record", "start", "offset", "words"} and row["file"] == planted.path
        assert TEXT in json.loads(records[row["start"] :].splitlines()[0])["text"]
        assert row["words"] in " ".join(normalised(TEXT)) and len(row["words"].split()) == 13


def test_documents_are_told_without_words_where_these_are_gone(
    open_stream: Open, planted: JsonlCorpus, evaluation: Any
) -> None:
    stream = open_stream(planted, validation=None, filters=evaluation(TEXT))
    chunks = [chunk for _, window in stream.first_epoch("planted") for chunk in window.chunks]
    column = str(stream.layout.filters.overlap_column)
    for chunk in chunks:
        (chunk.path / column).with_suffix(".jsonl").unlink()
    told = [row for chunk in chunks for row in dropped_overlaps(chunk, column, 7, 0.0)]
    assert len(told) == 10 and {row["words"] for row in told} == {None}


def test_tokens_have_no_text_to_compare(open_stream: Open, evaluation: Any, tmp_path: Path) -> None:
    corpus = TokensCorpus(name="made", kind="tokens", path=str(tmp_path / "made.ds"))
    with pytest.raises(DataError, match="tokens already cannot be compared") as caught:
        open_stream(corpus, filters=evaluation(TEXT))
    assert "corpus 'made'" in str(caught.value.where)


def read(**fields: Any) -> EvaluationText:
    return read_evaluation_text(DecontaminateSection(**fields), print)


def test_texts_too_short_to_be_looked_for_are_reported(evaluation: Any, capsys: pytest.CaptureFixture[str]) -> None:
    section = evaluation("Yes.", "No way!", TEXT)["decontaminate"]
    read_evaluation_text(DecontaminateSection(**section), print)
    assert capsys.readouterr().out == (
        "decontamination: 2 of 3 evaluation documents have fewer than 5 words and are not looked for\n"
    )


def test_bad_evaluation_files(evaluation: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read(path=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="the pattern matches no file"):
        read(path=str(tmp_path / "none*.jsonl"))
    path = evaluation(TEXT)["decontaminate"]["path"]
    with pytest.raises(DataError, match="field 'question'") as caught:
        read(path=path, field="question")
    assert path in str(caught.value)
    Path(path).write_text(json.dumps({"text": TEXT}) + '\n{"txt": "other"}\n')
    with pytest.raises(DataError, match="an evaluation record is unreadable: no field 'text'") as caught:
        read(path=path)
    assert f"{path}, record 1" in str(caught.value.where)
    short = evaluation("Yes.", "No.", name="evals/short.jsonl")["decontaminate"]["path"]
    with pytest.raises(DataError, match="hold no text of 5 words or more"):
        read(path=short)
    odd = evaluation("a", name="evals/odd.csv")["decontaminate"]["path"]
    with pytest.raises(DataError, match=r"read from .jsonl, .parquet and .txt files"):
        read(path=odd)
    with pytest.raises(ValueError, match="ngram"):
        DecontaminateSection(path=path, ngram=2)

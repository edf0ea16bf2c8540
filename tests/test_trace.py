from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmssl import cli
from lmssl.data.batch import SequenceBatch, training_batches
from lmssl.data.stream import SequenceStream
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.load import load_recipe
from lmssl.tokenizer.load import load_tokenizer
from runs import small_recipe, write_recipe

KEYS = {"position", "epoch", "ids", "segments", "num_padding_tokens"}
SEGMENT_KEYS = {"start", "length", "corpus", "file", "record", "byte_start", "byte_end"}
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(tmp_path: Path, text_folder: Path) -> Path:
    return write_recipe(
        tmp_path / "small.yaml", small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=40)
    )


@pytest.fixture
def ask(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask(*arguments)`: exit code, output and errors of `lmssl data`."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["data", str(recipe), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def open_stream(recipe: Path, *overrides: str) -> SequenceStream:
    loaded = load_recipe(recipe, overrides).recipe
    tokenizer = load_tokenizer("tokenizer/bpe-4k")
    return SequenceStream.open(loaded.data, tokenizer, loaded.data_seed, Path(loaded.data.cache))


def test_the_json_contract(ask: Ask, recipe: Path) -> None:
    code, out, err = ask("--position", "7", "--count", "3", "--json")
    assert (code, err) == (0, "")
    found, stream, tokenizer = lines(out), open_stream(recipe), load_tokenizer("tokenizer/bpe-4k")
    assert [line["position"] for line in found] == [7, 8, 9]
    for line in found:
        assert line.keys() == KEYS
        assert line["epoch"] == 0 and line["ids"] == stream.sequence(line["position"]).ids_T.tolist()
        assert sum(segment["length"] for segment in line["segments"]) + line["num_padding_tokens"] == 64
        for segment in line["segments"]:
            assert segment.keys() == SEGMENT_KEYS
            paragraphs = [part.strip("\n") for part in Path(segment["file"]).read_text(encoding="utf-8").split("\n\n")]
            text = [part for part in paragraphs if part.strip()][segment["record"]]
            raw = text.encode()[segment["byte_start"] : segment["byte_end"]]
            ids = line["ids"][segment["start"] : segment["start"] + segment["length"]]
            assert tokenizer.decode([i for i in ids if i != tokenizer.eos_id]) == raw.decode(errors="replace")


@pytest.mark.parametrize("skip", ["[]", "[[3, 20], [30, 31]]"])
def test_a_step_is_what_training_reads(ask: Ask, recipe: Path, skip: str) -> None:
    code, out, _ = ask("--step", "1", "--json", f"data.skip={skip}")
    assert code == 0
    batches = training_batches(
        open_stream(recipe, f"data.skip={skip}"),
        plan=BatchPlan.even(16),
        micro_batch_sequences=16,
        world_size=1,
        rank=0,
        start_step=1,
        num_steps=1,
        prepare=_itself,
        workers=0,
    )
    ((batch,),) = list(batches)
    found = lines(out)
    assert [line["ids"] for line in found] == batch.ids_BT.tolist()
    assert [line["position"] for line in found] == batch.positions_B.tolist()
    assert len(lines(ask("--step", "1", "--json", "--count", "2")[1])) == 2
    assert len(lines(ask("--step", "39", "--json", "--count", "99")[1])) == 16


def _itself(batch: SequenceBatch) -> SequenceBatch:
    return batch


def test_held_out_sequences(ask: Ask, recipe: Path) -> None:
    (split,) = open_stream(recipe).validation()
    code, out, err = ask("--split", "validation", "--position", "0", "--count", str(split.num_sequences), "--json")
    assert (code, err) == (0, "")
    assert [line["ids"] for line in lines(out)] == [
        split.sequence(i).ids_T.tolist() for i in range(split.num_sequences)
    ]
    assert {line["epoch"] for line in lines(out)} == {None}
    code, out, err = ask("--split", "validation", "--position", str(split.num_sequences), "--json")
    assert (code, out) == (3, "") and f"there are {split.num_sequences}" in err
    assert "held-out sequence 0  corpus text" in ask("--split", "validation", "--position", "0")[1]


def test_a_sequence_as_people_read_it(ask: Ask, recipe: Path) -> None:
    code, out, err = ask("--position", "5", "--full")
    assert (code, err) == (0, "") and "\x1b" not in out
    (line,) = lines(ask("--position", "5", "--json")[1])
    assert out.startswith("position 5  epoch 0  corpus text  ")
    shown = load_tokenizer("tokenizer/bpe-4k").decode(line["ids"][: line["segments"][0]["length"]])
    assert all(f"    {part}" in out for part in shown.split("\n"))
    for segment in line["segments"]:
        span = f"record {segment['record']}  bytes {segment['byte_start']}-{segment['byte_end']}"
        assert f"{segment['file']}  {span}" in out
    short = ask("--position", "5")[1]
    assert len(short.splitlines()) == 2 + 2 * len(line["segments"])
    assert max(len(text) for text in short.splitlines() if text.startswith("    ")) <= 80


def test_escape_sequences_of_a_corpus_do_not_reach_the_terminal(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "evil.txt").write_text("red \x1b[31m bell \x07 end", encoding="utf-8")
    where = ["data.validation=null", f"data.mixture=[{{name: a, kind: text, path: {tmp_path / 'evil.txt'}}}]"]
    for arguments in (["--position", "0"], ["--position", "0", "--full"], ["--find", "red"]):
        code, out, _ = ask(*arguments, *where)
        assert code == 0 and "\x1b" not in out and "\x07" not in out and r"\x1b[31m" in out


def test_find(ask: Ask) -> None:
    code, out, err = ask("--find", "assignment", "--json", "--limit", "5")
    assert code == 0 and "there are more; --limit 5" in err
    found = lines(out)
    assert len({(line["file"], line["record"]) for line in found}) == 5
    for line in found:
        assert line.keys() == {
            *("position", "epoch", "split", "corpus", "file", "record", "byte_start", "byte_end"),
        }
        if line["position"] is None:
            assert line["split"] == "validation"
            continue
        (sequence,) = lines(ask("--position", str(line["position"]), "--json")[1])
        assert any(s["file"] == line["file"] and s["record"] == line["record"] for s in sequence["segments"])
    code, out, _ = ask("--find", "assignment", "--limit", "5")
    assert code == 0 and "position" in out
    assert all("assignment" in line and len(line) <= 80 for line in out.splitlines()[1::2])
    assert ask("--find", "no such words", "--json") == (0, "", "no document contains this text\n")


def test_statistics(ask: Ask, recipe: Path) -> None:
    code, out, err = ask("--stats", "--json")
    assert code == 0 and "tokens, the whole epoch" in err
    (found,) = lines(out)
    assert found["num_sequences_per_epoch"] == open_stream(recipe).num_sequences_per_epoch()["text"]
    assert found["corpora"]["text"].items() <= found.items()
    assert sum(entry["documents"] for entry in found["length_histogram"]) == found["num_documents"]
    code, out, _ = ask("--stats")
    assert code == 0 and f"{found['num_documents']:,}" in out and "█" in out and "\x1b" not in out


def test_statistics_as_a_page_beside_json(ask: Ask, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = ask("--stats", "--json", "--html", str(page))
    assert code == 0 and err.endswith(f"the page is {page}\n")
    (found,) = lines(out)
    written = page.read_text(encoding="utf-8")
    assert f"{found['num_documents']:,}" in written and "<title>small: data of the first epoch</title>" in written
    code, out, _ = ask("--stats", "--html", str(page))
    shown = re.sub("<[^>]*>", "", page.read_text(encoding="utf-8"))
    assert code == 0 and all(line.rstrip() in shown for line in out.splitlines())


@pytest.mark.parametrize("name", ["", "none/page.html"])
def test_a_page_that_cannot_be_written_stops_before_the_epoch_is_read(ask: Ask, tmp_path: Path, name: str) -> None:
    code, out, err = ask("--stats", "--html", str(tmp_path / name))
    assert (code, out) == (1, "") and "the page cannot be written" in err and f"where:  {tmp_path / name}" in err
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def exam(tmp_path: Path) -> str:
    """An override that gives two sets for validation, of which the second is named `exam`."""
    for name, count in (("quiz", 30), ("exam", 200)):
        rows = (json.dumps({"text": f"{name} question {i}: what is the answer?"}) for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sets = ", ".join(f"{{name: {name}, kind: jsonl, path: {tmp_path}/{name}.jsonl}}" for name in ("quiz", "exam"))
    return f"data.validation.sets=[{sets}]"


def test_sequences_of_a_validation_set(ask: Ask, recipe: Path, exam: str) -> None:
    _, split = open_stream(recipe, exam).validation_sets()
    last = split.num_sequences - 1
    asked = ["--split", "exam", "--position"]
    code, out, err = ask(*asked, "0", "--count", str(split.num_sequences), "--json", exam)
    assert (code, err) == (0, "") and last > 10
    found = lines(out)
    assert [line["ids"] for line in found] == [split.sequence(i).ids_T.tolist() for i in range(split.num_sequences)]
    assert [line["position"] for line in found] == [*range(split.num_sequences)]
    for line in found:
        assert line.keys() == KEYS and line["epoch"] is None
        assert {segment["corpus"] for segment in line["segments"]} == {"exam"}
    code, out, err = ask(*asked, str(last + 1), "--json", exam)
    assert (code, out) == (3, "") and f"there is no sequence of 'exam' {last + 1}; there are {last + 1}" in err
    code, out, err = ask(*asked, "0", exam)
    assert code == 0 and out.startswith("sequence 0  corpus exam  ")


def test_a_text_in_a_validation_set(ask: Ask, exam: str) -> None:
    code, out, _ = ask("--find", "exam question 17:", "--json", exam)
    (line,) = lines(out)
    assert code == 0 and (line["split"], line["corpus"], line["record"], line["epoch"]) == ("exam", "exam", 17, None)
    _, out, _ = ask("--split", "exam", "--position", str(line["position"]), "--json", exam)
    assert any(segment["record"] == 17 for segment in lines(out)[0]["segments"])
    _, out, _ = ask("--find", "exam question 17:", exam)
    assert out.startswith(f"sequence {line['position']} of the validation set  exam  ")


def test_unknown_splits_are_answered_with_the_known_ones(ask: Ask, exam: str) -> None:
    code, _, err = ask("--position", "0", "--split", "exams", exam)
    assert code == 2 and "the splits are train, validation, quiz and exam" in err
    code, _, err = ask("--stats", "--split", "exam", exam)
    assert code == 2 and "--split exam with --stats" in err


@pytest.mark.parametrize(
    ("arguments", "where", "remedy"),
    [
        ([], "lmssl data", "give exactly one of"),
        (["--position", "1", "--stats"], "lmssl data", "give exactly one of"),
        (["--position", "-1"], "--position -1", "count from 0"),
        (["--step", "40"], "--step 40", "the run's steps are 0 to 39"),
        (["--step", "-1"], "--step -1", "the run's steps are 0 to 39"),
        (["--position", "1", "--count", "0"], "--count 0", "give at least 1"),
        (["--find", "a", "--limit", "0"], "--limit 0", "give at least 1"),
        (["--position", "1", "--html", "a.html"], "--html with --position", "--html goes with --stats"),
        (["--find", ""], "--find ''", "at least one character"),
        (["--position", "1", "--split", "test"], "--split test", "the splits are train and validation"),
        (["--step", "1", "--split", "validation"], "--split validation with --step", "with --position"),
        (
            ["--position", "1", "--split", "validation", "data.validation=null"],
            "--split validation",
            "the recipe holds nothing out",
        ),
    ],
)
def test_questions_that_cannot_be_answered(
    ask: Ask, tmp_path: Path, arguments: list[str], where: str, remedy: str
) -> None:
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "") and f"where:  {where}" in err and remedy in err
    assert not (tmp_path / "cache").exists()

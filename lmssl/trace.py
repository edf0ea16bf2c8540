"""`lmssl data`: what stands at a position, where a text is, and what an epoch holds.

Answers follow from the recipe alone; where it limits epochs and its run was given another length, from the run as well,
which keeps the shares it began with. JSON goes to standard output, one object a line; notes and progress do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from lmssl import checkpoint
from lmssl.data.ledger import Ledger
from lmssl.data.order import kept_position
from lmssl.data.search import Match, search
from lmssl.data.statistics import Statistics, measure
from lmssl.data.stream import SequenceStream
from lmssl.data.trace import TracedSegment, TracedSequence, Tracer
from lmssl.errors import DataError, RecipeError
from lmssl.recipe.objective import seps_per_segment
from lmssl.recipe.sections import Recipe
from lmssl.shipped import find
from lmssl.statistics_view import check_page, print_statistics, write_page
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Question:
    """What `lmssl data` was asked; exactly one of `position`, `step`, `text` and `statistics`."""

    position: int | None = None
    step: int | None = None
    text: str | None = None
    statistics: bool = False
    count: int | None = None
    """Sequences; None: one from a position on, and a step's whole batch."""
    split: str = "train"
    """One of `SPLITS`, or the name of one of `validation.sets`."""
    limit: int = 20
    """Documents that a text is looked up in."""
    full: bool = False
    as_json: bool = False
    page: Path | None = None
    """Where the statistics are written as HTML as well."""


def answer(recipe: Recipe, question: Question) -> None:
    """Print the answer.

    Raises:
        RecipeError: the question contradicts itself or the recipe.
        DataError: the corpora cannot be read, or changed since they were tokenized.
        LmsslError: the page cannot be written.
    """
    _check(recipe, question)
    if question.page is not None:
        check_page(question.page)
    notes, out = Console(stderr=True, soft_wrap=True, highlight=False), Console(highlight=False)

    def report(line: str) -> None:
        notes.print(line, markup=False)

    tokenizer = load_tokenizer(find(recipe.tokenizer.path))
    stream = _open_stream(recipe, tokenizer, report)
    if question.statistics:
        _show_statistics(_measured(stream, notes), recipe, question, out, report)
        return
    tracer = Tracer(stream, tokenizer)
    if question.text is not None:
        with notes.status("searching the sources"):
            matches, more = search(stream, question.text, finder=tracer.finder, limit=question.limit, report=report)
        for match in matches:
            _print_match(match, question.text, question, out)
        if not matches:
            report("no document contains this text")
        if more:
            report(f"there are more; --limit {question.limit} ends the list here")
        return
    sequences = _sequences(tracer, recipe, question)
    with notes.status("tokenizing up to there"):
        first = next(sequences)  # those that follow are read already, or soon
    for sequence in chain([first], sequences):
        _print_sequence(sequence, recipe, tokenizer, question, out)


def _open_stream(recipe: Recipe, tokenizer: Tokenizer, report: Callable[[str], None]) -> SequenceStream:
    """The order that the recipe's run has, or would have."""

    def opened(ledger: Ledger | None, read_positions: int | None) -> SequenceStream:
        return SequenceStream.open(
            recipe.data,
            tokenizer,
            seed=recipe.data_seed,
            cache_dir=Path(recipe.data.cache).expanduser(),
            ledger=ledger,
            report=report,
            batches=recipe.batches,
            read_positions=read_positions,
            seps_per_segment=seps_per_segment(recipe.objective),
        )

    if any(corpus.max_epochs is not None for corpus in recipe.data.mixture):
        newest = checkpoint.find_latest(Path(recipe.out_path), report)
        if newest is not None:
            ledger = Ledger.load(newest.path / "ledger.jsonl")
            with suppress(DataError):  # it is the run of another recipe
                return opened(ledger, int(json.loads(newest.text("state.json"))["cursor"]))
    return opened(None, None)


def _check(recipe: Recipe, question: Question) -> None:
    """Refuse a question before any text is read."""
    asked = [
        name
        for name, given in (
            ("--position", question.position is not None),
            ("--step", question.step is not None),
            ("--find", question.text is not None),
            ("--stats", question.statistics),
        )
        if given
    ]
    if len(asked) != 1:
        raise RecipeError(
            f"{' and '.join(asked)} exclude each other" if asked else "nothing was asked",
            where="lmssl data",
            remedy="give exactly one of --position, --step, --find and --stats",
        )
    validation = recipe.data.validation
    splits = [*SPLITS, *(corpus.name for corpus in (validation.sets if validation is not None else ()))]
    checks = [
        (question.position is not None and question.position < 0, f"--position {question.position}", "count from 0"),
        (
            question.step is not None and not 0 <= question.step < recipe.steps,
            f"--step {question.step}",
            f"the run's steps are 0 to {recipe.steps - 1}",
        ),
        (question.text == "", "--find ''", "give a text of at least one character"),
        (question.count is not None and question.count < 1, f"--count {question.count}", "give at least 1"),
        (question.limit < 1, f"--limit {question.limit}", "give at least 1"),
        (question.page is not None and not question.statistics, f"--html with {asked[0]}", "--html goes with --stats"),
        (
            question.split not in splits,
            f"--split {question.split}",
            f"the splits are {', '.join(splits[:-1])} and {splits[-1]}",
        ),
        (
            question.split != "train" and question.position is None,
            f"--split {question.split} with {asked[0]}",
            "sequences for validation have no steps: name one by its index with --position; --find finds them all",
        ),
        (
            question.split == "validation" and validation is None,
            "--split validation",
            "the recipe holds nothing out: give it a data.validation",
        ),
    ]
    for wrong, where, remedy in checks:
        if wrong:
            raise RecipeError("this cannot be answered", where=where, remedy=remedy)


def _sequences(tracer: Tracer, recipe: Recipe, question: Question) -> Iterator[TracedSequence]:
    positions = _positions(recipe, question)
    if question.split == "train":
        return tracer.sequences(positions)
    return tracer.held_out(positions) if question.split == "validation" else tracer.in_set(question.split, positions)


def _positions(recipe: Recipe, question: Question) -> range | list[int]:
    if question.position is not None:
        return range(question.position, question.position + (question.count or 1))
    first, size = recipe.batches.first_position(question.step or 0), recipe.batches.num_sequences(question.step or 0)
    return [kept_position(first + i, recipe.data.skip) for i in range(min(question.count or size, size))]


def _json_line(values: dict[str, Any]) -> None:
    # Flushed, so that a reader of the pipe sees it now, and its leaving is noticed.
    print(json.dumps(values), flush=True)


def _print_sequence(
    sequence: TracedSequence, recipe: Recipe, tokenizer: Tokenizer, question: Question, out: Console
) -> None:
    if question.as_json:
        _json_line(asdict(sequence))
        return
    held_out = sequence.epoch is None
    kind = "position" if not held_out else "held-out sequence" if question.split == "validation" else "sequence"
    name = f"{kind} {sequence.position}"
    count = len(sequence.segments)
    facts = [
        *([] if held_out else [f"epoch {sequence.epoch}"]),
        f"corpus {', '.join(dict.fromkeys(segment.corpus for segment in sequence.segments))}",
        f"{count} segment{'s' * (count != 1)}",
        f"{sequence.num_padding_tokens} of {len(sequence.ids)} tokens padding",
    ]
    out.print(Text.assemble((name, "bold"), "  ", "  ".join(facts)), soft_wrap=True)
    for segment in sequence.segments:
        ids = sequence.ids[segment.start : segment.start + segment.length]
        out.print(_origin(segment), soft_wrap=True)
        _print_text(tokenizer.decode(ids), question.full, out)
    out.print()


def _origin(segment: TracedSegment) -> Text:
    span = f"tokens {segment.start}-{segment.start + segment.length}"
    bytes_ = "no text" if segment.byte_start is None else f"bytes {segment.byte_start}-{segment.byte_end}"
    where = f"{segment.file}  record {segment.record}  {bytes_}"
    return Text.assemble("  ", (span, "cyan"), f"  {segment.corpus}  ", (_visible(where), "dim"))


def _print_text(text: str, full: bool, out: Console) -> None:
    """A text, indented; on one line, shortened in its middle, unless it is wanted in full."""
    if full:
        for line in text.split("\n"):
            out.print(Text(f"    {_visible(line)}"), soft_wrap=True)
    else:
        out.print(Text(f"    {_shortened(text, max(20, out.width - 4))}"), soft_wrap=True)


def _shortened(text: str, width: int) -> str:
    if len(text) > 4 * width:
        text = text[: 2 * width] + text[-2 * width :]  # what follows looks at every character
    line = _visible(text.replace("\n", "⏎"))
    if cell_len(line) <= width:
        return line
    head = (width - 3) * 2 // 3
    tail = set_cell_size(line[::-1], width - 3 - head)[::-1]
    return f"{set_cell_size(line, head)} … {tail}"


def _visible(text: str) -> str:
    # A corpus may hold escape sequences that a terminal would obey.
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def _print_match(match: Match, text: str, question: Question, out: Console) -> None:
    document = match.document
    if question.as_json:
        for position in match.positions or (None,):
            _json_line(
                {
                    "position": position,
                    "epoch": match.epoch,
                    "split": match.split,
                    "corpus": match.corpus,
                    "file": document.file,
                    "record": document.record,
                    "byte_start": document.byte_start,
                    "byte_end": document.byte_end,
                }
            )
        return
    numbers = f"{'s' * (len(match.positions) > 1)} {', '.join(map(str, match.positions))}"
    name = f"sequence{numbers} of the validation set" if match.epoch is None else f"position{numbers}"
    if not match.positions:
        name = "in no sequence" if match.split is None else "held out for validation"
    where = f"{document.file}  record {document.record}  bytes {document.byte_start}-{document.byte_end}"
    out.print(Text.assemble((name, "bold"), f"  {match.corpus}  ", (_visible(where), "dim")), soft_wrap=True)
    _print_text(document.text if question.full else _around(document.text, text, out.width - 4), question.full, out)


def _around(text: str, wanted: str, width: int) -> str:
    """What stands to both sides of a text's first occurrence, so much that the text itself is not shortened away."""
    begin = text.index(wanted)
    room = max(0, (width - cell_len(wanted)) // 2 - 2)
    left, right = text[max(0, begin - room) : begin], text[begin + len(wanted) :][:room]
    before, after = "…" * (begin > len(left)), "…" * (begin + len(wanted) + len(right) < len(text))
    return f"{before}{left}{wanted}{right}{after}"


def _measured(stream: SequenceStream, notes: Console) -> dict[str, Statistics]:
    """Statistics of each corpus, with progress."""
    found = {}
    for corpus in stream.section.mixture:
        with notes.status(f"{corpus.name}: reading") as status:
            found[corpus.name] = measure(stream, corpus.name, _progress(corpus.name, status.update))
        total = found[corpus.name]
        if not notes.is_terminal:
            notes.print(f"{corpus.name}: {total.num_tokens:,} tokens, the whole epoch", markup=False)
    return found


def _progress(corpus: str, show: Callable[[str], None]) -> Callable[[Statistics], None]:
    def heard(total: Statistics) -> None:
        show(f"{corpus}: {total.num_tokens:,} tokens, {total.num_documents:,} documents")

    return heard


def _show_statistics(
    found: dict[str, Statistics], recipe: Recipe, question: Question, out: Console, report: Callable[[str], None]
) -> None:
    if question.as_json:
        total = sum(found.values(), Statistics())
        _json_line({**total.to_json(), "corpora": {name: counts.to_json() for name, counts in found.items()}})
    else:
        print_statistics(found, out)
    if question.page is not None:
        write_page(found, f"{recipe.name}: data of the first epoch", question.page)
        report(f"the page is {question.page}")

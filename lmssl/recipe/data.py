"""The sections `data` and `tokenizer`: corpora, mixture, packing, validation split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmssl.recipe.base import AsTuple, Float, Int, Section
from lmssl.recipe.batches import stage_starts

Paths = Annotated[tuple[str, ...], AsTuple]
SectionBytes = Annotated[Int, Field(ge=256)]
"""Sections of a sentence or two at least; of none there would be no end."""


class Corpus(Section):
    """A named set of documents with its share of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in logs, metrics and cards."""
    weight: Float | None = Field(default=None, ge=0)
    """Share of tokens relative to the other weights; null: proportional to bytes. All corpora or none.

    0 is for a corpus that only a later stage reads."""
    max_epochs: Float | None = Field(default=None, gt=0)
    """Lower the corpus's share so that the run reads it about so many times at most; null: no limit."""


class TextCorpus(Corpus):
    """Plain text files, `.txt` or any other ending; `.gz` and `.zst` are decompressed."""

    kind: Literal["text"]
    path: str | Paths
    """Files, globs or folders (a folder means every `*.txt` below it), relative to the working directory, or URLs.

    URLs begin with `s3://`, `gs://`, `hf://` or, where allowed, `https://`."""
    allow_https: bool = False
    """Whether `path` may be an https URL, which is downloaded from whoever answers there."""
    document: Literal["file", "line", "paragraph"] = "file"
    """What one document is; paragraphs are separated by blank lines."""
    section_bytes: SectionBytes | Literal["auto"] | None = "auto"
    """Cut longer documents into sections near this size, at paragraph ends.

    `auto`: 65,536 for fewer than 1,000 whole-file documents."""


class JsonlCorpus(Corpus):
    """JSON lines, plain or compressed by gzip or zstd."""

    kind: Literal["jsonl"]
    path: str | Paths
    allow_https: bool = False
    """Whether `path` may be an https URL, which is downloaded from whoever answers there."""
    field: str = "text"
    """Name of the text field."""
    section_bytes: SectionBytes | None = None
    """Cut longer documents into sections near this size, at paragraph ends."""


class ParquetCorpus(Corpus):
    """Parquet files."""

    kind: Literal["parquet"]
    path: str | Paths
    allow_https: bool = False
    """Whether `path` may be an https URL, which is downloaded from whoever answers there."""
    field: str = "text"
    """Name of the text column."""
    section_bytes: SectionBytes | None = None
    """Cut longer documents into sections near this size, at paragraph ends."""


class DatasetsCorpus(Corpus):
    """A `datasets` folder written by `save_to_disk`, or a dataset on the Hub."""

    kind: Literal["datasets"]
    path: str
    """Folder or Hub id."""
    config: str | None = None
    """Configuration on the Hub."""
    split: str = "train"
    revision: str | None = None
    """Commit on the Hub; pin it for a reproducible run."""
    field: str = "text"
    section_bytes: SectionBytes | None = None
    """Cut longer documents into sections near this size, at paragraph ends."""


class TokensCorpus(Corpus):
    """Documents that are tokens already: `.ds` files of datatrove, or `.bin` files of Megatron, with their indexes."""

    kind: Literal["tokens"]
    path: str | Paths
    """Files, globs or folders (a folder means every `*.ds` and `*.bin` below it)."""
    ends_with_eos: bool | Literal["auto"] = "auto"
    """Whether each document ends with the tokenizer's eos token, which is taken off because packing adds it.

    `auto`: where it does."""


class PythonDocsCorpus(Corpus):
    """The text every CPython ships: the language reference and the standard library's docstrings."""

    kind: Literal["python_docs"]


AnyCorpus = Annotated[
    TextCorpus | JsonlCorpus | ParquetCorpus | DatasetsCorpus | TokensCorpus | PythonDocsCorpus,
    Field(discriminator="kind"),
]


class Validation(Section):
    """Documents held out of training, chosen by a hash of their text."""

    ratio: Float = Field(default=0.01, gt=0, lt=1)
    """Share of documents held out."""
    tokens: Int = Field(default=500_000, ge=1)
    """Tokens of held-out text that evaluation reads, over all corpora."""
    sets: Annotated[tuple[AnyCorpus, ...], AsTuple] = ()
    """Further corpora for evaluation only, each up to `tokens` and reported under its own name."""


class MixtureStage(Section):
    """A later part of the run with other weights or longer sequences, such as an annealing phase."""

    from_tokens: Int = Field(ge=1)
    """Where it begins, in tokens of the run; a step must begin there."""
    weights: dict[str, Annotated[Float, Field(ge=0)]] | None = None
    """Weight by name of the corpus; one left out has 0. Null: all as before."""
    sequence_length: Int | None = Field(default=None, ge=8)
    """Tokens per sequence from there on; null: as before."""
    rope_theta: Float | None = Field(default=None, gt=0)
    """Base of rotary positions from there on, of ModernBERT's global layers; null: as before."""


class FillInTheMiddleSection(Section):
    """Documents whose middle is moved to their end, so that the model learns to fill it in."""

    rate: Float = Field(default=0.5, gt=0, le=1)
    """Share of the training documents."""
    spm_rate: Float = Field(default=0.5, ge=0, le=1)
    """Share of these that begin with the suffix (SPM) instead of the prefix (PSM)."""
    prefix: str = "<|fim_prefix|>"
    """The token before the prefix."""
    middle: str = "<|fim_middle|>"
    """The token before the middle."""
    suffix: str = "<|fim_suffix|>"
    """The token before the suffix."""


class DecontaminateSection(Section):
    """Evaluation text that must not stand in the training text."""

    path: str | Paths
    """Files or globs of `.jsonl`, `.parquet` or `.txt` (one document per file), compressed or not."""
    field: str = "text"
    """Name of the text field in `.jsonl` and `.parquet`."""
    ngram: Int = Field(default=13, ge=3)
    """A training document that shares so many words in a row with an evaluation document is dropped."""


class FiltersSection(Section):
    """Which training documents are dropped, and counted."""

    min_tokens: Int | None = Field(default=None, ge=1)
    """Drop documents with fewer tokens, special tokens not counted; a section counts as a document."""
    max_tokens: Int | None = Field(default=None, ge=1)
    """Drop documents with more tokens, special tokens not counted; a section counts as a document."""
    drop_duplicates: bool = False
    """Show each distinct text of a corpus once per epoch."""
    decontaminate: DecontaminateSection | None = None
    """Drop documents that contain evaluation text; null: none."""

    @model_validator(mode="after")
    def _check_limits(self) -> FiltersSection:
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: {self.min_tokens} is more than max_tokens={self.max_tokens}; every document would be "
                "dropped"
            )
        return self


class DataSection(Section):
    """Corpora, their mixture and how documents become sequences."""

    sequence_length: Int = Field(ge=8)
    """Tokens per sequence; those of `stages` may have more or fewer."""
    packing: Literal["best_fit", "concat", "none"] = "best_fit"
    """How documents share sequences; `none`: one piece of a document per sequence."""
    align_starts: bool = False
    """Begin a sequence with the start of a document wherever it holds one."""
    document_attention: bool = True
    """Tokens attend within their own document only."""
    bos: bool = False
    """Put the tokenizer's bos token before each document."""
    eos: bool = True
    """Put the tokenizer's eos token after each document."""
    cls: bool = False
    """Put the tokenizer's cls token before each segment, a cut document's too."""
    sep: bool = False
    """Put the tokenizer's sep token after each segment, a cut document's too."""
    fill_in_the_middle: FillInTheMiddleSection | None = None
    """Rearrange documents for filling in the middle; null: none."""
    filters: FiltersSection = FiltersSection()
    """Which training documents are dropped."""
    mixture: Annotated[tuple[AnyCorpus, ...], AsTuple] = Field(min_length=1)
    """The corpora."""
    temperature: Float | None = Field(default=None, gt=0)
    """Every weight w becomes w^(1/T), in stages too (Arivazhagan et al. 2019); null: as written."""
    stages: Annotated[tuple[MixtureStage, ...], AsTuple] = ()
    """Later parts of the run with other weights."""
    skip: Annotated[tuple[Annotated[tuple[Int, Int], AsTuple], ...], AsTuple] = ()
    """Ranges of positions to leave out, as [start, end), ascending."""
    validation: Validation | None = Validation()
    """The held-out split; null: none."""
    seed: Int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of order, split and masks; null: the recipe's seed."""
    window_chunks: Int = Field(default=16, ge=1)
    """Chunks packed and shuffled together."""
    chunk_bytes: Int | None = Field(default=None, ge=1024)
    """Bytes of text per chunk; null: size / 64 up to 4 MiB, size / 1024 where that is more; 256 KiB to 64 MiB."""
    block_sequences: Int = Field(default=1024, ge=1)
    """Sequences per block; mixture shares are exact in each."""
    cache: str = "~/.cache/lmssl"
    """Folder of the token cache."""
    remote_cache_bytes: Int = Field(default=20_000_000_000, ge=1)
    """What downloads of remote corpora may take below `cache`; those read longest ago make room."""
    workers: Int = Field(default=1, ge=0)
    """Loader processes; the order does not depend on it."""
    max_bad_records: Int = Field(default=100, ge=0)
    """Unreadable records per corpus that are set aside and counted before the run stops."""

    @property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """First position and sequence length of the run's beginning and of each stage, as if nothing were skipped."""
        return stage_starts(self.sequence_length, [(stage.from_tokens, stage.sequence_length) for stage in self.stages])

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequences of any stage."""
        return max(length for _, length in self.starts)


def special_token_problems(section: DataSection) -> Iterator[str]:
    """Sentences as in `recipe.sections.contradictions` for special tokens around segments and others at once."""
    around = [f"data.{role}" for role in ("cls", "sep") if getattr(section, role)]
    if not around:
        return
    for role in ("bos", "eos"):
        if getattr(section, role):
            yield (
                f"{around[0]}: its token stands around each segment, and that of data.{role} around each document; "
                f"set data.{role}: false, or {' and '.join(around)}: false"
            )
    if section.fill_in_the_middle is not None:
        yield (
            f"data.fill_in_the_middle: it rearranges documents for next-token prediction, and {around[0]} belongs to "
            f"other objectives; leave data.fill_in_the_middle out, or set {' and '.join(around)}: false"
        )


class TokenizerSection(Section):
    """Which tokenizer the run uses."""

    path: str
    """A folder with `tokenizer.json`, as `lmssl tokenizer` or `save_pretrained` writes it."""
    pad_to_multiple: Int = Field(default=64, ge=1)
    """The model's vocabulary is rounded up to a multiple of this; 64 or 128 run fast."""

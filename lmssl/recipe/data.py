"""The sections `data` and `tokenizer`: corpora, mixture, packing, validation split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lmssl.recipe.base import AsTuple, Float, Int, Section

Paths = Annotated[tuple[str, ...], AsTuple]


class Corpus(Section):
    """A named set of documents with its share of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in logs, metrics and cards."""
    weight: Float | None = Field(default=None, gt=0)
    """Share of tokens relative to the other weights; null: proportional to bytes. All corpora or none."""


class TextCorpus(Corpus):
    """Plain text files, `.txt` or any other ending; `.gz` and `.zst` are decompressed."""

    kind: Literal["text"]
    path: str | Paths
    """Files, globs or folders (a folder means every `*.txt` below it), relative to the working directory."""
    document: Literal["file", "line", "paragraph"] = "file"
    """What one document is; paragraphs are separated by blank lines."""
    section_bytes: Int | Literal["auto"] | None = "auto"
    """Cut longer documents into sections near this size, at paragraph ends.

    `auto`: 65,536 for fewer than 1,000 whole-file documents."""


class JsonlCorpus(Corpus):
    """JSON lines, plain or compressed by gzip or zstd."""

    kind: Literal["jsonl"]
    path: str | Paths
    field: str = "text"
    """Name of the text field."""
    section_bytes: Int | None = None
    """Cut longer documents into sections near this size, at paragraph ends."""


class ParquetCorpus(Corpus):
    """Parquet files."""

    kind: Literal["parquet"]
    path: str | Paths
    field: str = "text"
    """Name of the text column."""
    section_bytes: Int | None = None
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
    section_bytes: Int | None = None
    """Cut longer documents into sections near this size, at paragraph ends."""


class PythonDocsCorpus(Corpus):
    """The text every CPython ships: the language reference and the standard library's docstrings."""

    kind: Literal["python_docs"]


AnyCorpus = Annotated[
    TextCorpus | JsonlCorpus | ParquetCorpus | DatasetsCorpus | PythonDocsCorpus, Field(discriminator="kind")
]


class Validation(Section):
    """Documents held out of training, chosen by a hash of their text."""

    ratio: Float = Field(default=0.01, gt=0, lt=1)
    """Share of documents held out."""
    tokens: Int = Field(default=500_000, ge=1)
    """Tokens of held-out text that evaluation reads, over all corpora."""


class DataSection(Section):
    """Corpora, their mixture and how documents become sequences."""

    sequence_length: Int = Field(ge=8)
    """Tokens per sequence."""
    packing: Literal["best_fit", "concat", "none"] = "best_fit"
    """How documents share sequences; `none`: one piece of a document per sequence."""
    document_attention: bool = True
    """Tokens attend within their own document only."""
    bos: bool = False
    """Put the tokenizer's bos token before each document."""
    eos: bool = True
    """Put the tokenizer's eos token after each document."""
    mixture: Annotated[tuple[AnyCorpus, ...], AsTuple] = Field(min_length=1)
    """The corpora."""
    validation: Validation | None = Validation()
    """The held-out split; null: none."""
    seed: Int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of order, split and masks; null: the recipe's seed."""
    window_chunks: Int = Field(default=16, ge=1)
    """Chunks packed and shuffled together."""
    chunk_bytes: Int | None = Field(default=None, ge=1024)
    """Bytes of text per chunk; null: total size / 64 within 256 KiB and 64 MiB."""
    block_sequences: Int = Field(default=1024, ge=1)
    """Sequences per block; mixture shares are exact in each."""
    cache: str = "~/.cache/lmssl"
    """Folder of the token cache."""
    workers: Int = Field(default=1, ge=0)
    """Loader processes; the order does not depend on it."""
    max_bad_records: Int = Field(default=100, ge=0)
    """Unreadable records per corpus that are set aside and counted before the run stops."""


class TokenizerSection(Section):
    """Which tokenizer the run uses."""

    path: str
    """A folder with `tokenizer.json`, as `lmssl tokenizer` or `save_pretrained` writes it."""
    pad_to_multiple: Int = Field(default=64, ge=1)
    """The model's vocabulary is rounded up to a multiple of this; 64 or 128 run fast."""

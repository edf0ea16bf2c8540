"""Sources -> units, from names and sizes (and parquet footers) alone."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lmssl.data import hf_datasets, parquet_files, python_docs, token_files
from lmssl.data.archive import COMPRESSED, expansion
from lmssl.data.records import Format, Part, TokenFormat, file_version
from lmssl.data.remote import RemoteFiles, check_scheme, is_remote
from lmssl.errors import DataError
from lmssl.recipe.data import AnyCorpus, DatasetsCorpus, ParquetCorpus, PythonDocsCorpus, TextCorpus, TokensCorpus

MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 256 << 10, 64 << 20
_CHUNKS_PER_CORPUS = 64
_MAX_CHUNKS_PER_CORPUS = 1024
_SMALL_CHUNK_BYTES = 4 << 20
"""As large as chunks get before a corpus has `_MAX_CHUNKS_PER_CORPUS` of them: small ones start and mix sooner."""
_AUTO_SECTION_BYTES, _AUTO_SECTION_FILES = 65_536, 1_000
_SAMPLE_FILES = 8
_ENDINGS = {"text": (".txt",), "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",), "tokens": (".ds", ".bin")}


@dataclass(frozen=True)
class Unit:
    """What an epoch permutes: a run of parts that is read in order."""

    corpus: str
    form: Format
    parts: tuple[Part, ...]
    num_bytes: int
    """Bytes of text, estimated where the source is compressed; 0: unknown."""
    chunk_bytes: int | None
    """It yields a chunk about every so many bytes of text; None: the whole unit is one chunk."""


@dataclass(frozen=True)
class _Piece:
    """A part before pieces are grouped into units."""

    part: Part
    num_bytes: int
    in_order: bool
    """Its size is a guess or it cannot be cut, so the unit yields as many chunks as it takes."""


def list_units(
    corpus: AnyCorpus, *, chunk_bytes: int | None = None, remote: RemoteFiles | None = None
) -> tuple[Unit, ...]:
    """The units of a corpus, in a stable order; `chunk_bytes` None: by corpus size.

    `remote` keeps the downloads of remote corpora; None: there must be none.

    Raises:
        DataError: no such file, a glob or folder that matches nothing, no content, a field that parquet files
            or a dataset do not have, or token files that do not fit their indexes.
    """
    if isinstance(corpus, DatasetsCorpus):
        form = _format(corpus, 1)
        source = hf_datasets.describe(form, corpus.path)
        target = chunk_bytes or default_chunk_bytes(source.num_bytes)
        return _group(corpus.name, form, _row_ranges(source, target), target)
    if isinstance(corpus, PythonDocsCorpus):
        paths = python_docs.list_files()
        sizes = [python_docs.num_text_bytes(path) for path in paths]
        target = chunk_bytes or default_chunk_bytes(sum(sizes))
        pieces = [_Piece(Part(path, file_version(path)), size, False) for path, size in zip(paths, sizes, strict=True)]
        return _group(corpus.name, _format(corpus, len(paths)), pieces, target)
    allow_https = not isinstance(corpus, TokensCorpus) and corpus.allow_https
    paths = expand_paths(corpus.path, corpus.kind, remote=remote, allow_https=allow_https)
    form = _format(corpus, len(paths))
    if isinstance(corpus, ParquetCorpus):
        groups = [group for path in paths for group in parquet_files.list_row_groups(path, corpus.field)]
        target = chunk_bytes or default_chunk_bytes(sum(num_bytes for _, num_bytes in groups))
        pieces = [_Piece(part, num_bytes, num_bytes > 2 * target) for part, num_bytes in groups]
    elif isinstance(corpus, TokensCorpus):
        num_bytes = sum(map(token_files.count_tokens, paths)) * token_files.TEXT_BYTES_PER_TOKEN
        target = chunk_bytes or default_chunk_bytes(num_bytes)
        ranges = (found for path in paths for found in token_files.list_ranges(path, lambda size: round(size / target)))
        pieces = [_Piece(part, size, False) for part, size in ranges]
    else:
        sizes = _text_bytes(paths)
        target = chunk_bytes or default_chunk_bytes(sum(sizes))
        pieces = [
            piece
            for path, size in zip(paths, sizes, strict=True)
            for piece in _byte_ranges(path, size, target if _can_cut(form) else None)
        ]
    if not any(piece.num_bytes for piece in pieces):
        raise empty_corpus(corpus.name)
    return _group(corpus.name, form, pieces, target)


def default_chunk_bytes(num_bytes: int) -> int:
    """Bytes of text per chunk for a corpus of this size; 0: unknown."""
    if not num_bytes:
        return MAX_CHUNK_BYTES // 4
    small = min(max(num_bytes // _CHUNKS_PER_CORPUS, MIN_CHUNK_BYTES), _SMALL_CHUNK_BYTES)
    return min(max(num_bytes // _MAX_CHUNKS_PER_CORPUS, small), MAX_CHUNK_BYTES)


def expand_paths(
    path: str | tuple[str, ...], kind: str, *, remote: RemoteFiles | None = None, allow_https: bool = False
) -> list[str]:
    """Files behind paths, globs, folders and URLs, absolute, sorted, each once.

    Raises:
        DataError: a path, glob or folder gives no file, or a URL cannot be read.
    """
    found: set[str] = set()
    for entry in (path,) if isinstance(path, str) else path:
        if remote is not None and is_remote(entry) and kind != "tokens":
            check_scheme(entry, allow_https=allow_https)
            found.update(remote.list_files(entry, lambda name: _is_wanted(os.path.basename(name), _ENDINGS[kind])))
            continue
        local = os.path.expanduser(entry)
        if os.path.isdir(local):
            matches = _files_below(local, _ENDINGS[kind])
            missing = f"the folder holds no {_ENDINGS[kind][0]} file"
        elif os.path.exists(local):
            matches, missing = [local], ""
        else:
            matches = [match for match in glob.glob(local, recursive=True) if os.path.isfile(match)]
            if kind == "tokens":  # a pattern for them easily matches the files that lie beside them
                matches = [match for match in matches if match.endswith(_ENDINGS[kind])]
            missing = "the pattern matches no file" if glob.has_magic(local) else "there is no such file"
        if not matches:
            remedy = f"check the spelling; relative paths start at {os.getcwd()}"
            if "://" in entry:
                remedy = "download the files first, or name a dataset on the Hub with kind: datasets"
            raise DataError(missing, where=entry, remedy=remedy)
        found.update(os.path.abspath(match) for match in matches)
    return sorted(found)


def empty_corpus(name: str) -> DataError:
    """The error for a corpus without any text."""
    return DataError(
        "the corpus holds no text",
        where=f"corpus {name!r}",
        remedy="point it at text that is not empty, or take it out of the recipe",
    )


def _files_below(folder: str, endings: tuple[str, ...]) -> list[str]:
    return [
        os.path.join(inner, name) for inner, _, names in os.walk(folder) for name in names if _is_wanted(name, endings)
    ]


def _is_wanted(name: str, endings: Sequence[str]) -> bool:
    wanted = tuple(ending + packed for ending in endings for packed in ("", *COMPRESSED))
    return name.endswith(wanted) and not name.startswith(".")


def _format(corpus: AnyCorpus, num_files: int) -> Format:
    if isinstance(corpus, PythonDocsCorpus):
        return Format("python_docs")
    if isinstance(corpus, TextCorpus):
        section_bytes = corpus.section_bytes
        if section_bytes == "auto":
            few = corpus.document == "file" and num_files < _AUTO_SECTION_FILES
            section_bytes = _AUTO_SECTION_BYTES if few else None
        return Format("text", document=corpus.document, section_bytes=section_bytes)
    if isinstance(corpus, TokensCorpus):
        return TokenFormat("tokens", ends_with_eos=corpus.ends_with_eos)
    form = Format(corpus.kind, field=corpus.field, section_bytes=corpus.section_bytes)
    if isinstance(corpus, DatasetsCorpus):
        form = replace(form, config=corpus.config, split=corpus.split, revision=corpus.revision)
    return form


def _can_cut(form: Format) -> bool:
    # A whole-file document can be cut only where it will be cut into sections anyway.
    return form.document != "file" or form.section_bytes is not None


def _text_bytes(paths: list[str]) -> list[int]:
    """Bytes of text per file; compressed ones are estimated from the start of a few of them."""
    sizes = [int(file_version(path).partition(".")[0]) for path in paths]
    packed = [i for i, path in enumerate(paths) if path.endswith(COMPRESSED)]
    if packed:
        step = -(-len(packed) // _SAMPLE_FILES)
        ratios = [expansion(paths[i]) for i in packed[::step]]
        for i in packed:
            sizes[i] = max(1, int(sizes[i] * sum(ratios) / len(ratios)))
    return sizes


def _byte_ranges(path: str, size: int, target: int | None) -> list[_Piece]:
    version, in_order = file_version(path), path.endswith(COMPRESSED)
    count = 1 if target is None or in_order else max(1, round(size / target))
    if count == 1:
        return [_Piece(Part(path, version), size, in_order)]
    cuts = [size * i // count for i in range(count + 1)]
    return [_Piece(Part(path, version, a, b), b - a, False) for a, b in pairwise(cuts)]


def _row_ranges(source: hf_datasets.Source, target: int) -> list[_Piece]:
    if source.num_rows is None:
        return [_Piece(Part(source.path, source.version), source.num_bytes, True)]
    count = max(1, min(source.num_rows, round(source.num_bytes / target)))
    cuts = [source.num_rows * i // count for i in range(count + 1)]
    size = source.num_bytes // count
    return [_Piece(Part(source.path, source.version, a, b), size, False) for a, b in pairwise(cuts)]


def _group(corpus: str, form: Format, pieces: Sequence[_Piece], chunk_bytes: int) -> tuple[Unit, ...]:
    """Runs of pieces of about `chunk_bytes` each."""
    runs: list[list[_Piece]] = []
    num_bytes = 0
    for piece in pieces:
        if not runs or num_bytes >= chunk_bytes or num_bytes + piece.num_bytes > chunk_bytes * 3 // 2:
            runs.append([])
            num_bytes = 0
        runs[-1].append(piece)
        num_bytes += piece.num_bytes
    return tuple(_unit(corpus, form, run, chunk_bytes) for run in runs)


def _unit(corpus: str, form: Format, run: list[_Piece], chunk_bytes: int) -> Unit:
    in_order = any(piece.in_order for piece in run)
    num_bytes = sum(piece.num_bytes for piece in run)
    return Unit(corpus, form, tuple(piece.part for piece in run), num_bytes, chunk_bytes if in_order else None)

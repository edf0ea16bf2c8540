"""Train a tokenizer; the same text gives the same bytes, in whatever order its words are counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lmssl.errors import TokenizerError
from lmssl.tokenizer.build import TokenizerBuild, load_build
from lmssl.tokenizer.folder import Sample, check_output, write_folder
from lmssl.tokenizer.split import SINGLE_SPACES, SPLIT_PATTERNS

__all__ = ["TokenizerBuild", "build_tokenizer", "load_build", "train_tokenizer"]

_ALPHABET_LIMIT = 1000
"""Characters of wordpiece; rarer ones become unk. BERT's own limit."""

_SCORE_DIGITS = 3
_PROBE_EVERY, _PROBE_BYTES = 50, 2_000_000


def train_tokenizer(build: TokenizerBuild, texts: Iterator[str]) -> tokenizers.Tokenizer:
    """Train on the first `sample_bytes` of the texts; wordpiece holds that text in memory.

    Raises:
        TokenizerError: the text is too little for `vocab_size`, or has too many characters for it.
    """
    tokens = build.control_tokens
    train = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[build.kind]
    backend = train(build, _limited(build, texts), _added_tokens(build))
    learned = backend.get_vocab_size(with_added_tokens=True)
    if learned != build.vocab_size:
        much = learned > build.vocab_size
        few = "give more text, lower min_frequency, or set"
        raise TokenizerError(
            f"{'the characters of the text alone take' if much else 'the text gives only'} {learned} tokens, "
            f"and vocab_size is {build.vocab_size}",
            where=f"tokenizer build {build.name}, vocab_size",
            remedy=f"set vocab_size well above {learned}" if much else f"{few} vocab_size to {learned}",
        )
    shape = "[reserved{}]" if build.objective == "masked" else "<|reserved_{}|>"
    missing = -learned % build.pad_to_multiple
    backend.add_special_tokens([AddedToken(shape.format(i), special=True, normalized=False) for i in range(missing)])
    if build.objective == "masked":
        cls, sep = tokens["cls"], tokens["sep"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(text, backend.token_to_id(text)) for text in (cls, sep)],
        )
    if build.objective == "span":
        eos = tokens["eos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
        )
    return backend


def build_tokenizer(build: TokenizerBuild, texts: Iterator[str], out: Path) -> Path:
    """Train and write the folder `out`.

    Raises:
        TokenizerError: `out` exists and is no tokenizer folder, or the text does not fit `vocab_size`.
    """
    check_output(out)
    probe = _Probe()
    backend = train_tokenizer(build, probe.watch(_limited(build, texts)))
    return write_folder(build, backend, probe.measure(backend), out)


def _added_tokens(build: TokenizerBuild) -> list[AddedToken]:
    # Outside wordpiece a word carries the space before it, so what stands for a word must swallow that space.
    swallow = (build.control_tokens.get("mask"), *build.sentinels) if build.kind != "wordpiece" else ()
    return [AddedToken(text, special=True, normalized=False, lstrip=text in swallow) for text in build.special_tokens]


def _train_bpe(build: TokenizerBuild, texts: Iterator[str], special: list[AddedToken]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _byte_level_split(build.split or "gpt2")
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=build.vocab_size,
        min_frequency=build.min_frequency,
        special_tokens=special,
        # Without it a byte absent from the text would have no token, and the tokenizer would not be lossless.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_wordpiece(build: TokenizerBuild, texts: Iterator[str], special: list[AddedToken]) -> tokenizers.Tokenizer:
    def untrained(**vocabulary: Any) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token=build.control_tokens["unk"], **vocabulary))
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            strip_accents=build.strip_accents,
            lowercase=build.lowercase,
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        return backend

    backend, held = untrained(), list(texts)
    first, inner = _alphabet(backend, held)
    # The trainer numbers `##x` in the order of a hash map and breaks ties by number; given as special tokens
    # their numbers are fixed. No max_token_length: with the prefix it makes merges that cannot be reached.
    trainer = trainers.WordPieceTrainer(
        vocab_size=build.vocab_size,
        min_frequency=build.min_frequency,
        special_tokens=[*special, *(f"##{character}" for character in inner)],
        limit_alphabet=len(first),
        initial_alphabet=first,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    backend.train_from_iterator(iter(held), trainer)
    finished = untrained(vocab=backend.get_vocab(with_added_tokens=False))
    finished.add_special_tokens(special)
    return finished


def _train_unigram(build: TokenizerBuild, texts: Iterator[str], special: list[AddedToken]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    spaces = [normalizers.Replace(Regex(pattern), content) for pattern, content in SINGLE_SPACES]
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), *spaces])
    # "first" and not "always": the full stop in `[MASK].` must not become a word of its own.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=build.vocab_size,
        special_tokens=special,
        unk_token=build.control_tokens["unk"],
        show_progress=False,
    )
    try:
        backend.train_from_iterator(texts, trainer)
    except Exception as error:  # the Rust side raises bare Exception
        if "all chars" not in str(error):
            raise
        raise TokenizerError(
            f"the characters of the text alone take more than vocab_size={build.vocab_size}",
            where=f"tokenizer build {build.name}, vocab_size",
            remedy="raise vocab_size, or leave out text in other scripts",
        ) from error
    return _settled(backend, len(special))


def _byte_level_split(split: str) -> Any:
    if split == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[split]), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _alphabet(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The most frequent characters of the text, and those of them that occur inside words."""
    counts: Counter[str] = Counter()
    words: set[str] = set()
    for text in texts:
        parts = backend.normalizer.normalize_str(text).split()
        counts.update("".join(parts))
        words.update(parts)
    first = sorted(sorted(counts), key=lambda character: -counts[character])[:_ALPHABET_LIMIT]
    split = backend.pre_tokenizer.pre_tokenize_str
    inner = {character for word in words for piece, _ in split(word) for character in piece[1:]}
    return sorted(first), sorted(inner & set(first))


def _settled(backend: tokenizers.Tokenizer, num_special: int) -> tokenizers.Tokenizer:
    """The same pieces, scored and ordered without the traces of a hash map's order.

    Sums over the map differ in their last digits from run to run: scores are rounded. Characters that the model
    would have dropped get the lowest score plus 0, 1, 2, ... times 1e-4 in the order of the map: all get the lowest.
    """
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    control, learned = vocabulary[:num_special], vocabulary[num_special:]
    lowest = min(score for _, score in learned)
    num_characters = sum(len(piece) == 1 for piece, _ in learned)

    def cost(piece: str, score: float) -> float:
        place = (score - lowest) / 1e-4
        added = len(piece) == 1 and place < num_characters and abs(place - round(place)) < 1e-4
        return -round(lowest if added else score, _SCORE_DIGITS)

    ordered = sorted((cost(piece, score), piece) for piece, score in learned)
    content["model"]["vocab"] = control + [[piece, -value] for value, piece in ordered]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _limited(build: TokenizerBuild, texts: Iterator[str]) -> Iterator[str]:
    room = build.sample_bytes
    for text in texts:
        content = text.encode("utf-8", errors="replace")[: min(room, build.max_document_bytes)]
        room -= len(content)
        yield content.decode("utf-8", errors="ignore")  # the cut may fall inside a character
        if room <= 0:
            return


class _Probe:
    """Counts the text on its way to the trainer and keeps some of it to measure with."""

    def __init__(self) -> None:
        self.num_documents = self.num_bytes = self.num_kept_bytes = 0
        self.kept: list[str] = []

    def watch(self, texts: Iterator[str]) -> Iterator[str]:
        """The texts, unchanged."""
        for text in texts:
            size = len(text.encode())
            if self.num_documents % _PROBE_EVERY == 0 and self.num_kept_bytes < _PROBE_BYTES:
                self.kept.append(text)
                self.num_kept_bytes += size
            self.num_documents += 1
            self.num_bytes += size
            yield text

    def measure(self, backend: tokenizers.Tokenizer) -> Sample:
        """The sample's numbers."""
        encodings = backend.encode_batch_fast(self.kept, add_special_tokens=False)
        return Sample(self.num_documents, self.num_bytes, self.num_kept_bytes, sum(len(e.ids) for e in encodings))

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from lmssl.errors import TokenizerError
from lmssl.tokenizer import encode, engines
from lmssl.tokenizer.encode import Encoder, adversarial_texts
from lmssl.tokenizer.engines import Encoded
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.split import PIECE_BYTES

needs_gigatoken = pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")


def documents(encoded: Encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.ids, encoded.ends)[:-1]]


def control_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that only an explicit control token may have; unk also stands for what cannot be spelled."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special} - {tokenizer.unk_id}


def from_backend(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_shapes_and_types(trained: Tokenizer) -> None:
    encoded = Encoder(trained).encode(["one two", "", "three"])
    assert (encoded.ids.dtype, encoded.ends.dtype) == (np.uint32, np.int64)
    assert encoded.ends[0] == encoded.ends[1] < encoded.ends[2] == len(encoded.ids)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_no_documents(byte_level: Tokenizer, engine: Any) -> None:
    encoded = Encoder(byte_level, engine).encode([])
    assert (len(encoded.ids), len(encoded.ends)) == (0, 0)


def test_byte_level_gives_every_text_back(byte_level: Tokenizer) -> None:
    texts = adversarial_texts(byte_level)
    assert [byte_level.decode(ids) for ids in documents(Encoder(byte_level).encode(texts))] == texts


def test_ids_are_those_of_the_backend(trained: Tokenizer, texts: list[str]) -> None:
    expected = [trained.backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert documents(Encoder(trained).encode(texts)) == expected


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_no_text_gives_a_control_token(trained: Tokenizer, engine: Any) -> None:
    texts = adversarial_texts(trained)
    assert any(token in text for text in texts for token in ("[MASK]", "<|endoftext|>", "<extra_id_0>"))
    assert not control_ids(trained) & set(Encoder(trained, engine).encode(texts).ids.tolist())


def test_unk_typed_in_a_text_is_spelled_out(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["wordpiece-lower"])
    assert tokenizer.unk_id not in Encoder(tokenizer).encode(["<|unk|>"]).ids
    assert tokenizer.unk_id in Encoder(tokenizer).encode(["\u2603"]).ids


def test_vocabulary_entry_of_a_word_model_is_no_way_to_a_control_token(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"[CLS]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[CLS]", "[UNK]"])
    tokenizer = from_backend(backend, tmp_path)
    assert documents(Encoder(tokenizer).encode(["word [CLS] word"])) == [[2, 1, 2]]


def test_ignore_merges_is_no_way_to_a_control_token(folders: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((folders["bpe-gpt2"] / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"] = {**content["pre_tokenizer"], "use_regex": False}
    tokenizer = from_backend(tokenizers.Tokenizer.from_str(json.dumps(content)), tmp_path)
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    tokenizer.backend.encode_special_tokens = True
    assert tokenizer.backend.encode("<|endoftext|>").ids == [end]  # the trap
    ids = Encoder(tokenizer, report=lambda line: None).encode(["<|endoftext|>"]).ids.tolist()
    assert end not in ids
    assert tokenizer.decode(ids) == "<|endoftext|>"


def test_a_control_token_that_merges_build_is_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folders["bpe-gpt2"] / "tokenizer.json"))
    backend.add_special_tokens(["the"])
    lines: list[str] = []
    Encoder(from_backend(backend, tmp_path), "reference", lines.append)
    assert lines == ["merges of this tokenizer build 'the', so text gives that control token's id"]


def test_an_ordinary_added_token_stays_one_token(folders: dict[str, Path], tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folders["bpe-gpt2"] / "tokenizer.json"))
    backend.add_tokens([AddedToken("New York", normalized=False)])
    tokenizer = from_backend(backend, tmp_path)
    expected = backend.encode("in New York now").ids
    assert documents(Encoder(tokenizer, report=lambda line: None).encode(["in New York now"])) == [expected]


def test_stored_padding_truncation_and_dropout_have_no_effect(folders: dict[str, Path], tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folders["bpe-gpt2"] / "tokenizer.json"))
    expected = backend.encode("one two three four").ids
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.model.dropout = 0.9
    assert documents(Encoder(from_backend(backend, tmp_path), "reference").encode(["one two three four"])) == [expected]


def test_long_documents_are_cut_without_effect(trained: Tokenizer, texts: list[str]) -> None:
    long = "\n\n".join(texts * 2)
    assert len(long) > PIECE_BYTES
    whole = trained.backend.encode(long, add_special_tokens=False).ids
    for engine in ("auto", "reference"):
        assert documents(Encoder(trained, engine).encode(["first", long, "x" * PIECE_BYTES * 2]))[1] == whole


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_ids_come_in_the_type_that_was_asked(
    trained: Tokenizer, texts: list[str], engine: Literal["auto", "reference"], threads: int
) -> None:
    given = [*texts, "", "\n\n".join(texts * 40)]
    assert sum(map(len, given)) > 2 << 20, "more than a piece for one thread"
    wide = Encoder(trained, "reference").encode(given)
    narrow = Encoder(trained, engine, threads=threads, dtype="<u2").encode(given)
    assert (wide.ids.dtype, narrow.ids.dtype) == (np.uint32, np.uint16)
    assert np.array_equal(wide.ids, narrow.ids) and np.array_equal(wide.ends, narrow.ends)
    assert Encoder(trained, engine, threads=threads, dtype="<u2").encode([]).ids.dtype == np.uint16


def test_batches_of_the_reference_do_not_show(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one two", "", "three", "four five six"]
    expected = documents(Encoder(trained, "reference").encode(texts))
    monkeypatch.setattr(engines, "_BATCH_BYTES", 6)
    assert documents(Encoder(trained, "reference").encode(texts)) == expected


@needs_gigatoken
def test_of_a_long_stretch_without_spaces_an_excerpt_is_checked(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, long = Encoder(byte_level), "日本語のテキスト、" * 10_000
    checked: list[bytes] = []
    reference = encoder._reference.encode

    def watched(raws: Sequence[bytes]) -> Encoded:
        checked.extend(raws)
        return reference(raws)

    monkeypatch.setattr(encoder._reference, "encode", watched)
    for texts in ([long], [long, "short", long]):
        assert documents(encoder.encode(texts)) == documents(Encoder(byte_level, "reference").encode(texts))
    assert encoder.engine == "gigatoken"
    excerpts = [raw for raw in checked if raw != b"short"]
    assert excerpts and all(900 < len(raw) <= 1024 and raw.decode() in long for raw in excerpts)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_lone_surrogate_names_the_document(byte_level: Tokenizer, engine: Any) -> None:
    encoder = Encoder(byte_level, engine)
    before = encoder.engine
    with pytest.raises(TokenizerError, match="document 1 holds a lone surrogate, U\\+D83D") as caught:
        encoder.encode(["fine", "ab\ud83d"])
    assert caught.value.where == "document 1, character 2"
    assert encoder.engine == before


def test_unknown_engine(byte_level: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="no engine 'fast'"):
        Encoder(byte_level, "fast")  # type: ignore[arg-type]


@needs_gigatoken
def test_gigatoken_agrees(byte_level: Tokenizer, texts: list[str]) -> None:
    lines: list[str] = []
    fast, reference = Encoder(byte_level, report=lines.append), Encoder(byte_level, "reference")
    assert (fast.engine, reference.engine, lines) == ("gigatoken", "tokenizers", [])
    for batch in (texts, adversarial_texts(byte_level), [""], ["", "a", ""]):
        assert documents(fast.encode(batch)) == documents(reference.encode(batch))
    assert fast.engine == "gigatoken"


@needs_gigatoken
def test_gigatoken_on_one_core_agrees(byte_level: Tokenizer, texts: list[str]) -> None:
    alone, reference = Encoder(byte_level, threads=1), Encoder(byte_level, "reference")
    for batch in (texts, adversarial_texts(byte_level), [""], ["", "a", ""], []):
        assert documents(alone.encode(batch)) == documents(reference.encode(batch))
    assert alone.engine == "gigatoken"


@needs_gigatoken
def test_threads_share_an_encoder(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_MAX_GROWTH_BYTES", -1 << 60)
    monkeypatch.setattr(engines, "_LOOK_BYTES", 10_000)
    encoder = Encoder(byte_level)
    batches = [[f"batch {i} text {j} {'word ' * (j % 50)}" for j in range(300)] for i in range(24)]
    expected = [documents(Encoder(byte_level, "reference").encode(batch)) for batch in batches]
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(documents, executor.map(encoder.encode, batches))) == expected
    assert encoder.engine == "gigatoken"


@needs_gigatoken
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_new_words_do_not_fill_the_memory(folders: dict[str, Path], threads: int) -> None:
    """Random words, none of which comes twice: kept, their 60 MB would take 450."""
    encoder, process = Encoder(load_tokenizer(folders["bpe-gpt2"]), threads=threads), psutil.Process()
    draw = np.random.default_rng(1)
    before, most = process.memory_info().rss, 0
    for _ in range(30):
        letters = draw.integers(ord("a"), ord("z") + 1, (160_000, 13), dtype=np.uint8)
        letters[:, 12] = ord(" ")
        encoder.encode_utf8([part.tobytes() for part in np.split(letters, 32)])
        most = max(most, process.memory_info().rss)
    assert encoder.engine == "gigatoken"
    assert most - before < 300e6


@needs_gigatoken
def test_gigatoken_is_renewed(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_MAX_GROWTH_BYTES", -1 << 60)
    monkeypatch.setattr(engines, "_LOOK_BYTES", 10)
    encoder = Encoder(byte_level)
    first = encoder._fast._idle[0]  # type: ignore[union-attr]
    texts = [f"some text {i}" for i in range(200)]
    expected = Encoder(byte_level, "reference").encode(texts)
    for _ in range(3):
        assert documents(encoder.encode(texts)) == documents(expected)
    assert encoder._fast._idle[0] is not first  # type: ignore[union-attr]


@needs_gigatoken
@pytest.mark.parametrize("threads", [0, 1])
def test_gigatoken_is_renewed_by_the_text_it_encoded(byte_level: Tokenizer, threads: int) -> None:
    fast = Encoder(byte_level, threads=threads)._fast
    assert isinstance(fast, engines._Gigatoken)
    fast._idle, fast._max_text_bytes = [], 2500
    left = list[int]()
    for _ in range(7):
        fast.encode([b"word " * 200])
        left.append(fast._idle[0].num_bytes if fast._idle else 0)
    assert left == [1000, 2000, 0, 1000, 2000, 0, 1000]


@needs_gigatoken
def test_threads_that_call_at_once_have_an_engine_each(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_LOOK_BYTES", 1 << 16)  # so that fresh ones come amid calls
    monkeypatch.setattr(engines, "_MAX_GROWTH_BYTES", -1 << 60)
    texts = [f"word{i} and {i * 7919} more of them\n" * 40 for i in range(120)]
    expected = [Encoder(byte_level, "reference").encode([text]).ids.tolist() for text in texts]
    encoder = Encoder(byte_level, threads=4)
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda text: encoder.encode([text]).ids.tolist(), texts))
    assert encoder.engine == "gigatoken"
    assert found == expected
    assert 1 <= len(encoder._fast._idle) <= 4  # type: ignore[union-attr]


def test_unigram_uses_the_reference_without_a_word(folders: dict[str, Path]) -> None:
    lines: list[str] = []
    assert Encoder(load_tokenizer(folders["unigram"]), report=lines.append).engine == "tokenizers"
    assert lines == []


class Wrong:
    """An engine that is right until told otherwise."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.reference = Encoder(tokenizer, "reference")
        self.fault = ""

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        ids, ends = self.reference.encode_utf8(raws)
        if self.fault == "id":
            ids = ids.copy()
            ids[-1] += 1
        if self.fault == "lost":
            ends = ends[:-1]
        if self.fault == "error":
            raise RuntimeError("out of\n luck")
        return Encoded(ids, ends)


@pytest.fixture
def wrong(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Wrong:
    engine = Wrong(byte_level)
    monkeypatch.setattr(encode, "open_gigatoken", lambda content, threads, dtype: engine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return engine


FAULTS = {"id": "differently", "lost": "results for", "error": "out of luck"}


@pytest.mark.parametrize("fault", FAULTS)
def test_engine_that_differs_from_the_start_is_not_used(byte_level: Tokenizer, wrong: Wrong, fault: str) -> None:
    wrong.fault = fault
    lines: list[str] = []
    encoder = Encoder(byte_level, report=lines.append)
    assert encoder.engine == "tokenizers"
    assert len(lines) == 1 and FAULTS[fault] in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_engine_that_differs_later_is_dropped_for_good(byte_level: Tokenizer, wrong: Wrong, fault: str) -> None:
    lines: list[str] = []
    encoder = Encoder(byte_level, report=lines.append)
    expected = documents(Encoder(byte_level, "reference").encode(["good", "bad"]))
    assert documents(encoder.encode(["good", "bad"])) == expected
    assert (encoder.engine, lines) == ("gigatoken", [])
    wrong.fault = fault
    assert documents(encoder.encode(["good", "bad"])) == expected  # this call is already right
    assert encoder.engine == "tokenizers"
    wrong.fault = ""
    assert documents(encoder.encode(["good", "bad"])) == expected
    assert encoder.engine == "tokenizers"
    assert len(lines) == 1 and FAULTS[fault] in lines[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_engine_that_differs_in_an_excerpt_is_dropped(byte_level: Tokenizer, wrong: Wrong, fault: str) -> None:
    lines: list[str] = []
    encoder, texts = Encoder(byte_level, report=lines.append), ["語" * 5000]
    expected = documents(Encoder(byte_level, "reference").encode(texts))
    wrong.fault = fault
    assert documents(encoder.encode(texts)) == expected
    assert encoder.engine == "tokenizers" and len(lines) == 1 and FAULTS[fault] in lines[0]


def test_without_a_report_it_is_a_warning(byte_level: Tokenizer, wrong: Wrong) -> None:
    wrong.fault = "id"
    with pytest.warns(RuntimeWarning, match="gigatoken encoded"):
        Encoder(byte_level)


def test_samples_are_small_and_reach_every_document() -> None:
    pieces = [b"x" * 1000] * 100
    samples = [encode._sample(pieces, call, True)[0] for call in range(200)]
    assert max(map(len, samples)) <= 5
    assert {i for sample in samples for i in sample} == set(range(100))
    assert encode._sample([], 0, True) == ({}, [])
    assert encode._sample([b"only"], 7, True) == ({0: [b"only"]}, [])


def test_samples_of_texts_without_spaces_are_excerpts() -> None:
    long, spaced = "é日x".encode() * 10_000, b"some words " * 6_000
    seen, num_excerpts = list[int](), 0
    for call in range(40):
        chosen, excerpts = encode._sample([long, spaced, long, spaced], call, True)
        assert {*chosen} <= {1, 3} and all(len(parts) == 3 and len(parts[1]) < 1100 for parts in chosen.values())
        assert all(1000 < len(excerpt) <= 1024 and excerpt in long for excerpt in excerpts)
        assert chosen or excerpts
        seen, num_excerpts = [*seen, *chosen], num_excerpts + len(excerpts)
        assert not encode._sample([long, spaced], call, False)[0]
    assert {*seen} == {1, 3} and num_excerpts > 10

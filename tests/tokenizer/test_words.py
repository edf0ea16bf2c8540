"""Word starts are those of the tokenizer's own encodings, in every script and for every kind of tokenizer."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lmssl.errors import TokenizerError
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.words import WordStarts

BoolArray = npt.NDArray[np.bool_]

SCRIPTS = {
    "english": "The dog, \"don't\" they'll I'LL can't; 12345 and 1,234.56e-7 -- it's the end...  \n\n  Two   spaces!  ",
    "code": "def f(x):\n\tif x:\n        return {'a': [1, 2]}  # don't 'S's''\n\n\nclass A_b(C):\r\n\r\n    pass\n",
    "chinese": "我能吞下玻璃而不伤身体。他说：“今天天气很好，我们去公园吧！”2024年，人口为1,411,750,000。",
    "japanese": "日本語のテキスト、カタカナと漢字。「はい」と言いました。　全角の空白",
    "thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำ สวัสดีครับ ผมชื่อสมชาย",
    "arabic": "اللغة العربية جميلة جدا، وعدد الكلمات ١٢٣ كلمة. مَرْحَبًا بِكُمْ",
    "hindi": "हिन्दी में लिखा हुआ वाक्य। नमस्ते दुनिया!",
    "emoji": "👨\u200d👩\u200d👧\u200d👦 ok 🏳\ufe0f\u200d🌈👍🏽🇩🇪🇫🇷 ☎\ufe0f #\ufe0f\u20e3 done🎉🎉 e\u0301clair",
    "odd": "a\0b\0 \x01\x1c\x7f\ufeff\ufffd\uffff \u0085z\u00a0\u2003\u3000q\u200b \n\r\n\r \t\n x",
}
SHIPPED = sorted(file.parent.name for file in Path(__file__).parents[2].glob("tokenizer/*/tokenizer.json"))


def documents(seed: int) -> Iterator[str]:
    """Every script by itself, and random mixtures of stretches of all."""
    yield from SCRIPTS.values()
    source = random.Random(seed)
    texts = list(SCRIPTS.values())
    for _ in range(40):
        found = []
        for _ in range(source.randrange(1, 40)):
            text = source.choice(texts)
            start = source.randrange(len(text))
            found.append(text[start : start + source.choice((1, 2, 5, 12))])
        yield "".join(found)


def expected(backend: Backend, text: str) -> tuple[list[int], BoolArray]:
    """Ids of a document, and its word starts by the tokenizer's own account."""
    backend.encode_special_tokens = True  # as in the cache, where no text spells a special token
    encoding = backend.encode(text, add_special_tokens=False)
    words = np.array(encoding.word_ids)
    return list(encoding.ids), np.append(True, words[1:] != words[:-1])[: len(words)]


def starts(words: WordStarts, ids: list[int]) -> BoolArray:
    return words.starts(np.array([ids]), np.ones((1, len(ids)), np.int32))[0]


def check_documents(tokenizer: Tokenizer) -> None:
    """Every document's words are the tokenizer's, first and from memory."""
    words = WordStarts.of(tokenizer)
    for text in [*documents(1), *documents(1)]:
        ids, wanted = expected(tokenizer.backend, text)
        if ids:
            np.testing.assert_array_equal(starts(words, ids), wanted, err_msg=repr(text))


def check_segments(tokenizer: Tokenizer) -> None:
    """Segments cut anywhere inside a document agree with it but for the words at the cuts."""
    words, source = WordStarts.of(tokenizer), random.Random(2)
    num_inner = num_cuts = num_same = 0
    for text in documents(2):
        ids, wanted = expected(tokenizer.backend, text)
        for _ in range(4):
            first, stop = sorted(source.choices(range(len(ids) + 1), k=2))
            if stop == first:
                continue
            found, whole = starts(words, ids[first:stop]), wanted[first:stop].copy()
            whole[0] = True
            places = np.flatnonzero(whole)
            # Where the cut goes through a character, nothing tells whether the first word goes on behind it.
            begin = 1 + int(tokenizer.decode(ids[:first]).endswith("\ufffd"))
            inner = slice(places[begin], places[-2] + 1) if len(places) > 4 else slice(0)
            np.testing.assert_array_equal(found[inner], whole[inner], err_msg=repr((text, first, stop)))
            num_inner += found[inner].sum()
            num_cuts += 1
            num_same += int((found == whole).all())
    assert num_inner > 300
    assert num_same > 0.6 * num_cuts


@pytest.mark.parametrize("folder", SHIPPED)
def test_documents_have_the_words_of_a_shipped_tokenizer(root: Path, folder: str) -> None:
    check_documents(load_tokenizer(root / "tokenizer" / folder))


@pytest.mark.parametrize("folder", SHIPPED)
def test_segments_have_the_words_of_their_document(root: Path, folder: str) -> None:
    check_segments(load_tokenizer(root / "tokenizer" / folder))


def test_documents_have_the_words_of_a_trained_tokenizer(trained: Tokenizer) -> None:
    check_documents(trained)


BYTES = pre_tokenizers.ByteLevel.alphabet()
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
UNUSUAL = {
    "roberta": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), {"initial_alphabet": BYTES}),
    "digits": (
        models.BPE(),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
        {"initial_alphabet": BYTES},
    ),
    "two splits": (
        models.BPE(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                pre_tokenizers.Split(Regex(r"[一-龥ぁ-ヶ]+"), "isolated"),
                BYTE_LEVEL,
            ]
        ),
        {"initial_alphabet": BYTES},
    ),
    "clip": (models.BPE(end_of_word_suffix="</w>"), pre_tokenizers.Whitespace(), {"end_of_word_suffix": "</w>"}),
    "sentencepiece": (models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), {}),
    "xlm-r": (
        models.Unigram(),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        {"unk_token": "<unk>"},
    ),
    "punctuation": (
        models.BPE(unk_token="<unk>"),
        pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]),
        {},
    ),
    "marked punctuation": (
        models.BPE(unk_token="<unk>"),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]),
        {},
    ),
    "words": (models.WordLevel(unk_token="<unk>"), pre_tokenizers.Whitespace(), {}),
}


def unusual(name: str, texts: list[str], folder: Path, vocab_size: int = 1500) -> Tokenizer:
    """A tokenizer of a kind that lmssl does not train."""
    model, split, options = UNUSUAL[name]
    backend = Backend(model)
    backend.pre_tokenizer = split
    trainer = {
        models.BPE: trainers.BpeTrainer,
        models.Unigram: trainers.UnigramTrainer,
        models.WordLevel: trainers.WordLevelTrainer,
    }[type(model)]
    special = ["<unk>", "<s>"]
    backend.train_from_iterator(
        texts, trainer(vocab_size=vocab_size, special_tokens=special, show_progress=False, **options)
    )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", UNUSUAL)
def test_documents_have_the_words_of_other_kinds_of_tokenizers(name: str, texts: list[str], tmp_path: Path) -> None:
    check_documents(unusual(name, [*texts[:2], *documents(1)], tmp_path))


@pytest.mark.parametrize("name", ["sentencepiece", "xlm-r", "punctuation", "words"])
def test_unknown_letters_stand_inside_words(name: str, texts: list[str], tmp_path: Path) -> None:
    tokenizer = unusual(name, texts[:4], tmp_path, vocab_size=300)
    ids, wanted = expected(tokenizer.backend, "the жdog, dжжog жж, ж (жa) aж the")
    assert tokenizer.unk_id in ids
    assert starts(WordStarts.of(tokenizer), ids).tolist() == wanted.tolist()


def test_dog_and_comma_are_two_words(root: Path) -> None:
    for folder in ("bpe-4k", "bpe-16k"):
        tokenizer = load_tokenizer(root / "tokenizer" / folder)
        ids = tokenizer.backend.encode("The dog, the dog.", add_special_tokens=False).ids
        found = np.flatnonzero(starts(WordStarts.of(tokenizer), ids)).tolist()
        spelt = [tokenizer.decode(ids[a:b]) for a, b in zip(found, [*found[1:], len(ids)], strict=True)]
        assert spelt == ["The", " dog", ",", " the", " dog", "."]


def test_special_tokens_padding_and_segments_bound_words(root: Path) -> None:
    for folder in ("bpe-32k", "unigram-8k", "wordpiece-8k"):
        tokenizer = load_tokenizer(root / "tokenizer" / folder)
        special = tokenizer.eos_id if tokenizer.cls_id is None else tokenizer.cls_id
        assert special is not None
        inner = next(
            ids[1:]
            for word in ("extraordinariness", "xylotomography")
            if len(ids := tokenizer.backend.encode(word, add_special_tokens=False).ids) > 2
        )
        ids = [special, *inner, special, special, *inner[:2], *inner[:2], 0, 0]
        segments = [1] * (len(inner) + 3) + [1, 1, 2, 2, 0, 0]
        found = WordStarts.of(tokenizer).starts(np.array([ids]), np.array([segments], np.int32))[0]
        if (
            "wordpiece" in folder
        ):  # `##x` never begins a word of WordPiece, but a segment or what follows a special does
            assert tokenizer.backend.id_to_token(inner[0]).startswith("##")
        rest = [False] * (len(inner) - 1)
        assert found.tolist() == [True, True, *rest, True, True, True, False, True, False, False, False]


def test_ordinary_added_tokens_are_words_of_their_own(root: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(root / "tokenizer/bpe-4k/tokenizer.json"))
    backend.add_tokens([AddedToken("bilxty", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids, wanted = expected(tokenizer.backend, "unbelievabilxty and liabilxtyless")
    found = starts(WordStarts.of(tokenizer), ids)
    assert found.tolist() == wanted.tolist()
    assert found[ids.index(tokenizer.num_tokens - 1)]


def test_a_character_cut_by_the_segment_shifts_nothing(root: Path) -> None:
    tokenizer = load_tokenizer(root / "tokenizer/bpe-4k")
    words = WordStarts.of(tokenizer)
    for text in ("龘龘 龘 the dog, the cat, the end, 龘 ran 龘", "🦖🦖 🦖 the dog, the cat, the end, 🦖 ran 🦖"):
        ids, wanted = expected(tokenizer.backend, text)
        assert tokenizer.decode(ids[:2]) == "\ufffd"  # several tokens a character
        inner = np.flatnonzero(wanted)[1:-1]
        for cut in range(1, 6):
            for end in range(1, 3):
                found = starts(words, ids[cut:-end])
                kept = inner[(inner > cut + 6) & (inner < len(ids) - end - 6)]
                assert len(kept) > 2
                assert (
                    np.flatnonzero(found)[np.isin(np.flatnonzero(found) + cut, kept)].tolist() == (kept - cut).tolist()
                )


@pytest.mark.parametrize("text", ["the dog🦖", "the 日本龘", "the dog→", "the caf，", "the ру龘"])
def test_a_character_cut_at_the_end_is_taken_for_what_it_most_likely_was(root: Path, text: str) -> None:
    tokenizer = load_tokenizer(root / "tokenizer/bpe-4k")
    ids, wanted = expected(tokenizer.backend, text)
    cut = [end for end in range(2, len(ids)) if tokenizer.decode(ids[:end]).endswith("\ufffd")]
    assert cut
    for end in cut:
        assert starts(WordStarts.of(tokenizer), ids[:end]).tolist() == wanted[:end].tolist()


def test_what_text_is_cut_at_changes_nothing(root: Path) -> None:
    """Wherever a pattern surely splits, the text is cut; of random runs of signs, spaces and letters none tells."""
    source = random.Random(5)
    parts = ["'s", "'LL", "'re", "ab", "Z", "é", "Ж", "字", "²", "٣", "12", "0", "_", "-", ",", "'", '"', "--", "…"]
    parts += [" ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u0301", "🎉"]
    for folder in ("bpe-4k", "bpe-16k"):
        tokenizer = load_tokenizer(root / "tokenizer" / folder)
        words = WordStarts.of(tokenizer)
        for _ in range(400):
            text = "".join(source.choices(parts, k=source.randrange(1, 20)))
            ids, wanted = expected(tokenizer.backend, text)
            np.testing.assert_array_equal(starts(words, ids), wanted, err_msg=repr(text))


def test_rows_and_what_came_before_do_not_matter(trained: Tokenizer) -> None:
    words, fresh = WordStarts.of(trained), WordStarts.of(trained)
    ids = [id for text in documents(3) for id in expected(trained.backend, text)[0]]
    rows = np.array(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    segments = np.ones(rows.shape, np.int32)
    segments[:, 40:] = 2
    together = words.starts(rows, segments)
    again = pickle.loads(pickle.dumps(words)).starts(rows, segments)
    for row in reversed(range(len(rows))):
        np.testing.assert_array_equal(fresh.starts(rows[[row]], segments[[row]])[0], together[row])
    np.testing.assert_array_equal(again, together)


def test_what_is_remembered_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmssl.tokenizer.words._MAX_REMEMBERED", 8)
    tokenizer = load_tokenizer(root / "tokenizer/bpe-4k")
    words = WordStarts.of(tokenizer)
    for text in documents(4):
        ids, wanted = expected(tokenizer.backend, text)
        if ids:
            np.testing.assert_array_equal(starts(words, ids), wanted)
    assert words._text is not None and len(words._text._remembered) <= 8


@pytest.mark.parametrize("split", [None, pre_tokenizers.Whitespace()])
def test_tokens_that_do_not_show_words_are_an_error(split: object, texts: list[str], tmp_path: Path) -> None:
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    if split is not None:
        backend.pre_tokenizer = split
    backend.decoder = decoders.Fuse()
    backend.train_from_iterator(texts[:3], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="do not show where words begin") as raised:
        WordStarts.of(load_tokenizer(tmp_path))
    assert raised.value.where == str(tmp_path)
    assert "objective.strategy: token or span" in str(raised.value.remedy)

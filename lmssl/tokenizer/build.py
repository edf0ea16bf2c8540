"""What a tokenizer build file may say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmssl.recipe.base import AsTuple, Int, Section
from lmssl.recipe.data import AnyCorpus
from lmssl.recipe.load import load_section

CAUSAL_TOKENS = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>"}
MASKED_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SPAN_TOKENS = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""T5's names for what stands in the place of a span, and as many."""


class TokenizerBuild(Section):
    """One tokenizer: its kind, its size and the text it is trained on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the tokenizer and of its default folder."""
    licence: str = Field(min_length=1)
    """What it was trained on and under which terms; printed in its README."""
    kind: Literal["bpe", "wordpiece", "unigram"]
    """bpe is byte-level and lossless; wordpiece and unigram drop white space and map unseen characters to unk."""
    objective: Literal["causal", "masked", "span"]
    """causal: `<|endoftext|>` and `<|pad|>`; masked: `[PAD] [UNK] [CLS] [SEP] [MASK]`, with [CLS] and [SEP] put
    around each text or pair where transformers encodes it; span: T5's `<pad> </s> <unk>` and `<extra_id_0>` to
    `<extra_id_99>`, with </s> put after each text."""
    vocab_size: Int = Field(ge=32)
    """Tokens to learn, control tokens and single bytes or characters included."""
    pad_to_multiple: Int = Field(default=64, ge=1)
    """Reserved special tokens fill the size up to a multiple of this."""
    extra_special_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AsTuple] = ()
    """Further control tokens, such as the sentinels of `data.fill_in_the_middle`; text never gives their ids."""
    split: Literal["gpt2", "llama3", "qwen2"] | None = None
    """Pre-tokenizer of bpe, one that llama.cpp knows; null: gpt2."""
    lowercase: bool = False
    """wordpiece only."""
    strip_accents: bool = False
    """wordpiece only."""
    min_frequency: Int = Field(default=2, ge=1)
    """Pairs seen less often are not merged; unigram does not use it."""
    mixture: Annotated[tuple[AnyCorpus, ...], AsTuple] = Field(min_length=1)
    """The corpora, as in a recipe."""
    sample_bytes: Int = Field(default=1 << 30, ge=1, le=10 << 30)
    """Text to read. More changes little, and the trainer counts pairs in 32 bits: one seen 2.1e9 times is lost."""
    max_document_bytes: Int = Field(default=100_000, ge=1)
    """Only the beginning of a longer document is read, so that no single document decides the vocabulary."""

    @property
    def control_tokens(self) -> dict[str, str]:
        """Role to text; wordpiece and unigram cannot spell every text, so they have unk for causal as well."""
        if self.objective != "causal":
            return MASKED_TOKENS if self.objective == "masked" else SPAN_TOKENS
        return CAUSAL_TOKENS if self.kind == "bpe" else {**CAUSAL_TOKENS, "unk": "<|unk|>"}

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Control tokens, sentinels and extra ones, each once."""
        return tuple(dict.fromkeys([*self.control_tokens.values(), *self.sentinels, *self.extra_special_tokens]))

    @property
    def sentinels(self) -> tuple[str, ...]:
        """What stands in the place of spans."""
        return SENTINELS if self.objective == "span" else ()

    @model_validator(mode="after")
    def _cross_check(self) -> TokenizerBuild:
        if self.kind != "bpe" and self.split is not None:
            raise ValueError(f"split: {self.split!r} is for kind bpe; remove it for {self.kind}")
        for option in ("lowercase", "strip_accents"):
            if self.kind != "wordpiece" and getattr(self, option):
                raise ValueError(f"{option}: it is for kind wordpiece; remove it for {self.kind}")
        extra = self.extra_special_tokens
        for index, token in enumerate(extra):
            if token in (*self.control_tokens.values(), *self.sentinels) or token in extra[:index]:
                raise ValueError(f"extra_special_tokens.{index}: {token!r} is a control token already; remove it")
        taken = 256 + len(self.special_tokens)
        if self.kind == "bpe" and self.vocab_size <= taken:
            raise ValueError(
                f"vocab_size: {self.vocab_size} leaves no merges; bytes and control tokens alone take {taken}"
            )
        return self


def load_build(path: str | Path, overrides: Sequence[str] = ()) -> TokenizerBuild:
    """Read a build file.

    Raises:
        RecipeError: anything about the file, its keys and values, or an override is wrong.
    """
    return load_section(TokenizerBuild, Path(path), overrides)

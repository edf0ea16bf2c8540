"""Write a tokenizer folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from lmssl.errors import TokenizerError
from lmssl.tokenizer.build import TokenizerBuild

_NO_LENGTH_LIMIT = int(1e30)
"""What transformers writes for a tokenizer that does not know its model's length."""

_WHAT = {"bpe": "Byte-level BPE, lossless", "wordpiece": "WordPiece", "unigram": "Unigram"}


@dataclass(frozen=True)
class Sample:
    """The text a tokenizer was trained on, in numbers."""

    num_documents: int
    num_bytes: int
    num_probe_bytes: int
    num_probe_tokens: int
    """The probe is every so-manieth document of the sample, encoded after training."""


def write_folder(build: TokenizerBuild, backend: tokenizers.Tokenizer, sample: Sample, out: Path) -> Path:
    """Write all files beside `out`, then take its place."""
    temporary, old = out.parent / f".tmp-{out.name}", out.parent / f".old-{out.name}"
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    names = {f"{role}_token": text for role, text in build.control_tokens.items()}
    _write_json(temporary / "tokenizer.json", json.loads(backend.to_str()))
    _write_json(temporary / "tokenizer_config.json", _config(build) | names)
    _write_json(temporary / "special_tokens_map.json", names)
    (temporary / "build.yaml").write_text(build_yaml(build), encoding="utf-8")
    (temporary / "README.md").write_text(readme(build, backend, sample), encoding="utf-8")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out


def check_output(out: Path) -> None:
    """Refuse to replace anything but a tokenizer folder or an empty one.

    Raises:
        TokenizerError: `out` is something else.
    """
    if not out.exists():
        return
    names = {file.name for file in out.iterdir()} if out.is_dir() else {out.name}
    if names and not names & {"tokenizer.json", "build.yaml"}:
        raise TokenizerError(
            "the output exists and is not a tokenizer folder", where=str(out), remedy="choose another folder"
        )


def build_yaml(build: TokenizerBuild) -> str:
    """The build file's values as YAML that `load_build` reads back to an equal build."""
    return "".join(_yaml_lines(build))


def readme(build: TokenizerBuild, backend: tokenizers.Tokenizer, sample: Sample) -> str:
    """The folder's README: what it is, what it was trained on, how well it compresses, how to rebuild it."""
    split = f", {build.split or 'gpt2'} split" if build.kind == "bpe" else ""
    corpora = ", ".join(corpus.name for corpus in build.mixture)
    tokens = " ".join(f"`{text}`" for text in build.special_tokens if text not in build.sentinels)
    if build.sentinels:
        tokens += f", and sentinels `{build.sentinels[0]}` to `{build.sentinels[-1]}`"
    size = backend.get_vocab_size(with_added_tokens=True)
    ratio = sample.num_probe_bytes / max(1, sample.num_probe_tokens)
    rebuild = f"lmssl tokenizer tokenizer/{build.name}/build.yaml"
    paragraphs = (
        f"{_WHAT[build.kind]}{split}, {size:,} tokens, for {build.objective} language models. Control tokens: "
        f"{tokens}.",
        f"Trained on {sample.num_documents:,} documents ({corpora}), {sample.num_bytes:,} bytes: the first "
        f"{build.max_document_bytes:,} bytes of each. {build.licence}",
        f"{ratio:.2f} bytes per token on a probe of {sample.num_probe_bytes:,} bytes of that text.",
        f"`AutoTokenizer` reads this folder. To train it again: `{rebuild}`.",
    )
    return "\n\n".join([f"# {build.name}", *(_filled(part) for part in paragraphs)]) + "\n"


def _config(build: TokenizerBuild) -> dict[str, Any]:
    inputs = ["input_ids", "attention_mask"]
    if build.objective == "masked" and build.kind != "bpe":
        inputs.insert(1, "token_type_ids")  # BERT and ALBERT take them; ModernBERT and causal models refuse them
    return {
        # Transformers 5 writes a class name that 4 does not know; both know this one.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _NO_LENGTH_LIMIT,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
    }


def _yaml_lines(build: TokenizerBuild) -> Iterator[str]:
    # JSON scalars are YAML; one line per key and per corpus reads like the recipes.
    for key, value in build.model_dump(mode="json", exclude_unset=True).items():
        if key != "mixture":
            yield f"{key}: {_yaml_scalar(value)}\n"
            continue
        yield "mixture:\n"
        for corpus in value:
            first = [part for part in ("name", "kind") if part in corpus]
            items = [(part, corpus[part]) for part in (*first, *(part for part in corpus if part not in first))]
            yield "  - {" + ", ".join(f"{part}: {json.dumps(v, ensure_ascii=False)}" for part, v in items) + "}\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, str) and len(value) > 90 and value.isprintable() and " ".join(value.split()) == value:
        return ">-\n" + textwrap.indent(_filled(value), "  ")
    return json.dumps(value, ensure_ascii=False)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

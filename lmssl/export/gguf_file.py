"""A GGUF file, which llama.cpp and what is built on it read: llama, qwen3 and gpt2 with tokenizers that it knows.

llama.cpp has the splitting of text into words built in, by name, so only a tokenizer that splits exactly as one of
these names says can be written. Its own converter knows tokenizers by hashes of ids and refuses every one that somebody
trained. What else it has built in, such as activations, no file can change: a model that differs there is refused, for
transformers, which reads the file back here, takes those from the config and would not see it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmssl.errors import ExportError
from lmssl.export.verify import Probe
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.split import SPLIT_PATTERNS

ARCHITECTURES = {"llama": "LLAMA", "qwen3": "QWEN3", "gpt2": "GPT2"}

BUILT_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu",)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}
"""Values of the config that llama.cpp takes for granted."""

TOLERANCE = 1e-3
"""Largest difference of float32 logits, as a share of the largest logit; the numbers in the file are the same."""

_NAMES_OF_SPLITS = {SPLIT_PATTERNS["llama3"]: "llama-bpe", SPLIT_PATTERNS["qwen2"]: "qwen2"}


def check_gguf(model: PreTrainedModel, tokenizer: Tokenizer) -> str:
    """What llama.cpp calls the way the tokenizer splits text.

    Raises:
        ExportError: the package is missing, or llama.cpp would read the model or its text otherwise.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("a GGUF file takes the package gguf", where="--gguf", remedy="pip install gguf")
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"a {kind} model is not written as GGUF",
            where="--gguf",
            remedy=f"leave it out; it is for {', '.join(ARCHITECTURES)}",
        )
    _check_built_in(model.config)
    content = json.loads((tokenizer.path / "tokenizer.json").read_text(encoding="utf-8"))
    split = _split_name(content.get("pre_tokenizer") or {})
    if content["model"].get("type") != "BPE" or content.get("normalizer") is not None or split is None:
        raise ExportError(
            "llama.cpp does not know how this tokenizer splits text",
            where="--gguf",
            remedy="leave it out; tokenizers of kind bpe with the split gpt2, llama3 or qwen2 can be written",
        )
    if split == "llama-bpe":
        _check_whole_words(tokenizer)
    _added_around(tokenizer)
    return split


def _check_built_in(config: Any) -> None:
    for name, values in BUILT_IN[config.model_type].items():
        if getattr(config, name, values[0]) not in values:
            raise ExportError(
                f"llama.cpp runs {config.model_type} with {name}: {values[0]} only, and here it is "
                f"{getattr(config, name)}",
                where="--gguf",
                remedy="leave it out",
            )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
        raise ExportError(
            f"rotary positions of type {rope['rope_type']} are not written as GGUF",
            where="--gguf",
            remedy="leave it out; plain ones with any rope_theta can be written",
        )


def _added_around(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text and eos behind it; llama.cpp can do nothing else there."""
    whole = tokenizer.backend.encode("a").ids
    plain = tokenizer.backend.encode("a", add_special_tokens=False).ids
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    for before in ([], bos):
        for behind in ([], eos):
            if whole == [*before, *plain, *behind]:
                return bool(before), bool(behind)
    raise ExportError(
        "the tokenizer puts more around a text than bos and eos, and llama.cpp does not",
        where="--gguf",
        remedy="leave it out, or take the post_processor out of tokenizer.json",
    )


def _split_name(pre_tokenizer: dict[str, Any]) -> str | None:
    if pre_tokenizer.get("type") == "ByteLevel":
        plain = pre_tokenizer.get("use_regex", True) and not pre_tokenizer.get("add_prefix_space")
        return "gpt-2" if plain else None
    parts = pre_tokenizer.get("pretokenizers", [])
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"] or parts[1].get("use_regex", True):
        return None
    isolated = parts[0].get("behavior") == "Isolated" and not parts[1].get("add_prefix_space")
    return _NAMES_OF_SPLITS.get(parts[0].get("pattern", {}).get("Regex", "")) if isolated else None


def _check_whole_words(tokenizer: Tokenizer) -> None:
    """Under `llama-bpe` a word that is a token is taken whole: the same only where merging gives it, too."""
    merged = tokenizer.backend.model
    special = {added.content for added in tokenizer.backend.get_added_tokens_decoder().values()}
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        if token not in special and [part.id for part in merged.tokenize(token)] != [number]:
            raise ExportError(
                f"the token {token!r} is never made by merging, and llama.cpp would make it",
                where="--gguf",
                remedy="leave it out, or use a tokenizer with the split gpt2 or qwen2",
            )


def write_gguf(model: PreTrainedModel, tokenizer: Tokenizer, path: Path, *, name: str, split: str) -> None:
    """Write weights, sizes and tokenizer in one file; matrices in the type of the model, vectors in float32.

    Args:
        model: in the type its weights are written in.
        name: of the model.
        split: as `check_gguf` gives it.
    """
    import gguf

    config, kind = model.config, model.config.model_type
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_context_length(int(getattr(config, "max_position_embeddings", None) or config.n_positions))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_vocab_size(config.vocab_size)
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    stored = getattr(gguf.GGMLQuantizationType, kinds[model.dtype])
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[kinds[model.dtype]])
    _add_tokenizer(writer, tokenizer, split, num_rows=config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for full, weight in model.named_parameters():
        array = _array(full, weight, model)
        wanted = stored if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        where = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if where is None:
            raise ExportError(f"llama.cpp has no place for {full}", where="--gguf", remedy="leave it out")
        writer.add_tensor(where, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, split: str, *, num_rows: int) -> None:
    from gguf import TokenType

    by_id = {number: token for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    kinds: dict[int, Any] = dict.fromkeys(by_id, TokenType.NORMAL)
    for number, added in tokenizer.backend.get_added_tokens_decoder().items():  # the others are found in any text
        kinds[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    tokens = [by_id.get(number, f"[UNUSED{number}]") for number in range(num_rows)]
    types = [kinds.get(number, TokenType.UNUSED) for number in range(num_rows)]
    merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for role in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{role}_id")
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    before, behind = _added_around(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(behind)


def _array(name: str, weight: Tensor, model: PreTrainedModel) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A weight as llama.cpp lays it out: outputs first, and llama's rotary pairs side by side."""
    found = weight.detach().to(torch.float32)
    config = model.config
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        found = found.T  # transformers keeps these as inputs x outputs
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = found.reshape(heads, 2, found.shape[0] // heads // 2, *found.shape[1:])
        found = halves.swapaxes(1, 2).reshape(found.shape)
    return found.contiguous().numpy()


def verify_gguf(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> float:
    """Logits of the file, as transformers reads it, against the model; returns the largest difference.

    Args:
        model: with the weights that were written, in float32.
    Raises:
        ExportError: they differ.
    """
    probe = Probe.of(model, tokenizer)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing turns off
        read = type(model).from_pretrained(path.parent, gguf_file=path.name, config=model.config, dtype=torch.float32)
    ours = probe.logits(model)
    difference = float((probe.logits(read.eval()) - ours).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise ExportError(
            f"the GGUF file gives other logits: they differ by {difference:.3g}",
            where=str(path),
            remedy="export without --gguf, and report this with the recipe; nothing was written",
        )
    return difference

"""The files of a stock transformers folder, in the form that versions 4 and 5 read alike."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import BertForPreTraining, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lmssl.errors import ExportError
from lmssl.model.build import SPAN_KINDS
from lmssl.model.encoder import ROBERTA_KINDS
from lmssl.tokenizer.load import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What an export takes from a tokenizer folder; nothing else travels."""

MAX_SHARD_SIZE = "5GB"
"""Of one safetensors file, unless something else is asked for."""

_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
"""Keys under which libraries write where on this machine something came from."""


def write_stock(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, *, max_shard_size: str) -> None:
    """Weights, config, generation config and tokenizer.

    Args:
        model: in the type its weights are written in.
        max_shard_size: of one weights file, such as 5GB.
    Raises:
        ExportError: `max_shard_size` is no size.
    """
    config = model.config
    if model.can_generate():
        config.eos_token_id = tokenizer.end_id if config.eos_token_id is None else config.eos_token_id
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in names})
    disable_progress_bar()
    if not re.fullmatch(r"[1-9]\d*(?:KB|MB|GB|TB)", max_shard_size):
        raise ExportError(
            f"{max_shard_size} is no size of a file", where="--max-shard-size", remedy="write 500MB or 5GB"
        )
    model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=_weights(model))
    _fix_config(model, folder / "config.json")
    for name in TOKENIZER_FILES:
        if (tokenizer.path / name).exists():
            shutil.copyfile(tokenizer.path / name, folder / name)
    _fix_tokenizer_config(folder, model)
    if model.can_generate() and tokenizer.eos_id is None and tokenizer.sep_id is not None:
        _end_with_sep(folder, str(tokenizer.backend.id_to_token(tokenizer.sep_id)))


def _weights(model: PreTrainedModel) -> dict[str, Any]:
    """All weights, for mT5 with an output matrix of its own.

    Version 4 scales what a tied one reads, in all of T5's family, and version 5 no longer does for mT5.
    """
    weights = model.state_dict()
    if model.config.model_type == "mt5":
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    return weights


def _fix_config(model: PreTrainedModel, path: Path) -> None:
    written = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 and vLLM read these two at the top level and fall back to 10000 and float32 without a word.
    rope = written.get("rope_parameters") or {}
    if "rope_theta" in rope:
        written["rope_theta"] = rope["rope_theta"]
    if model.config.model_type == "modernbert":  # version 4 knows its layers and rotations by these names only
        layers = written["layer_types"]
        rest = (i for i, kind in enumerate(layers) if i and kind == "full_attention")
        written["global_attn_every_n_layers"] = next(rest, len(layers))
        written["global_rope_theta"] = rope["full_attention"]["rope_theta"]
        written["local_rope_theta"] = rope["sliding_attention"]["rope_theta"]
    if model.config.model_type == "mt5":  # version 5 ties it whatever stands here
        written["tie_word_embeddings"] = False
    written["dtype"] = written["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    written["architectures"] = [type(model).__name__]
    for key in _PLACES:
        written.pop(key, None)
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def max_tokens(config: Any) -> int | None:
    """The longest text a model reads, special tokens included; None: no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if config.model_type in ROBERTA_KINDS and positions is not None:
        return positions - int(config.pad_token_id) - 1  # its positions begin after that of padding
    if config.model_type in SPAN_KINDS:
        return None
    return positions or getattr(config, "n_positions", None)


def _input_names(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """What a tokenizer is to give a model, of what it gives: no more than the model takes.

    Classes like roberta's take types of tokens, but have one only, and fail at a pair's second. A model that was asked
    about pairs was trained with types, and gets them even where its tokenizer is for models that take none.
    """
    types, accepted = "token_type_ids", set(inspect.signature(model.forward).parameters)
    if (getattr(model.config, "type_vocab_size", None) or 0) < 2:
        accepted.discard(types)
    given = [name for name in names if name in accepted]
    if isinstance(model, BertForPreTraining) and types not in given:
        given.insert(given.index("input_ids") + 1, types)
    return given


def _fix_tokenizer_config(folder: Path, model: PreTrainedModel) -> None:
    """`TokenizersBackend` is a transformers 5 name that version 4 refuses; the class below loads in both."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config = {key: value for key, value in config.items() if key not in _PLACES}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    max_length = max_tokens(model.config)
    if max_length is not None:
        config["model_max_length"] = max_length
    config["model_input_names"] = _input_names(model, config.get("model_input_names", ["input_ids", "attention_mask"]))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    specials = {k: v for k, v in config.items() if k.endswith("_token") and k != "add_prefix_token" and v is not None}
    if not (folder / "special_tokens_map.json").exists():
        text = json.dumps(specials, indent=2, ensure_ascii=False) + "\n"
        (folder / "special_tokens_map.json").write_text(text, encoding="utf-8")


def _end_with_sep(folder: Path, sep: str) -> None:
    """A tokenizer that ends texts with sep, for a decoder: sep is where it stops, and does not stand behind prompts."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content["eos_token"] = sep
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    processor = content.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":
            for form in ("single", "pair"):
                while part[form] and part[form][-1].get("SpecialToken", {}).get("id") == sep:
                    part[form].pop()
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

"""What fine-tuning starts from: a transformers folder and the class that a kind of task needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, set_seed

from lmssl.errors import ModelError
from lmssl.recipe.hints import nearest
from lmssl.release.marker import checksum

HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "instructions": "AutoModelForCausalLM",
}


_DECIDING = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Start:
    """A pretrained model before it has a head."""

    name: str
    """Folder or Hub id."""
    config: Any
    tokenizer: Any
    random_weights: bool = False
    """Only the architecture is taken; every weight is drawn anew."""

    def fingerprint(self) -> str:
        """A hash of the files that decide what is learned, or the commit on the Hub."""
        folder = Path(self.name)
        if not folder.is_dir():
            return str(getattr(self.config, "_commit_hash", None))
        found = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.name in _DECIDING or (path.suffix in (".safetensors", ".bin") and not self.random_weights):
                found.update(f"{path.name} {path.stat().st_size} {checksum(path)}\n".encode())
        return found.hexdigest()

    @property
    def max_tokens(self) -> int | None:
        """The longest text the model reads; None: no limit is known."""
        most = self.tokenizer.model_max_length
        positions = getattr(self.config, "max_position_embeddings", None)
        limits = [limit for limit in (most if most < 1e9 else None, positions) if limit is not None]
        return int(min(limits)) if limits else None


def open_start(name: str, *, random_weights: bool = False) -> Start:
    """Find a model's config and tokenizer; weights are loaded later, once per run.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError("this folder holds no model", where=name, remedy=_folder_remedy(folder))
    source = str(folder) if folder.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(
            f"the model cannot be read: {str(error).splitlines()[0]}", where=name, remedy=_missing_remedy(folder)
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "its tokenizer does not say where tokens stand in the text",
            where=name,
            remedy="give a model with a tokenizer.json",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError("its tokenizer has no token to pad with", where=name, remedy="give it a pad_token")
    tokenizer.padding_side = "right"
    return Start(source, config, tokenizer, random_weights)


def build_model(start: Start, kind: str, *, labels: tuple[str, ...], seed: int) -> PreTrainedModel:
    """The pretrained weights under the head that a kind of task needs, in float32.

    The global random state is set to `seed`; it decides the new head, and with `random_weights` everything.

    Raises:
        ModelError: the family has no such head, or the weights do not fit the body.
    """
    auto_class = getattr(transformers, HEADS[kind])
    config = AutoConfig.from_pretrained(start.name)
    _check_family(start, config, kind, auto_class)
    if kind != "instructions":
        config.num_labels = len(labels) or 1
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = {"classification": "single_label_classification", "regression": "regression"}.get(kind)
    if config.pad_token_id is None:
        config.pad_token_id = start.tokenizer.pad_token_id
    set_seed(seed)
    if start.random_weights:
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
        return model
    try:
        model, said = auto_class.from_pretrained(
            start.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the weights cannot be loaded: {str(error).splitlines()[0]}",
            where=start.name,
            remedy="check that the folder is whole; `lmssl export` writes it again",
        ) from error
    body = model.base_model_prefix + "."
    missing = sorted(name for name in said["missing_keys"] if name.startswith(body) and "pooler" not in name)
    if missing:
        raise ModelError(
            f"{len(missing)} weights of the body are missing, such as {missing[0]}; they would be random",
            where=start.name,
            remedy="give the whole export; start from random weights only on purpose, with --random-weights",
        )
    return model


def _check_family(start: Start, config: Any, kind: str, auto_class: Any) -> None:
    family = config.model_type
    classes = {head for head in set(HEADS.values()) if type(config) in getattr(transformers, head)._model_mapping}
    if HEADS[kind] not in classes:
        able = [other for other, head in HEADS.items() if head in classes]
        raise ModelError(
            f"transformers has no {HEADS[kind].removeprefix('AutoModelFor')} model of the family {family}",
            where=start.name,
            remedy=f"it can be fine-tuned for {' or '.join(able)}" if able else "give a model of another family",
        )
    names = getattr(config, "architectures", None) or [""]
    if kind == "instructions" and not names[0].endswith(("ForCausalLM", "LMHeadModel")):
        # A BERT loads as a causal class too, and would see the answers it is asked for.
        raise ModelError(
            f"{names[0] or family} was not trained to continue text",
            where=start.name,
            remedy="instructions need a causal model; this one can learn classification, regression and tokens",
        )


def _folder_remedy(folder: Path) -> str:
    if (folder / "export" / "config.json").exists():
        return f"did you mean {folder / 'export'}?"
    if (folder / "recipe.yaml").exists():
        return f"this is a run; write its model with `lmssl export {folder}`"
    return "give a folder with config.json and model.safetensors, such as an export"


def _missing_remedy(folder: Path) -> str:
    if folder.parent != Path(".") and folder.parent.is_dir() and not folder.exists():
        near = nearest(folder.name, [found.name for found in folder.parent.iterdir() if found.is_dir()])
        if near:
            return f"did you mean {folder.with_name(near)}?"
    return "give a folder that `lmssl export` wrote, or the id of a model on the Hub"

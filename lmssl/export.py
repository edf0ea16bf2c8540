"""From a checkpoint to a folder that stock transformers loads, proven in a fresh process before it appears."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, BertForPreTraining, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lmssl import checkpoint
from lmssl.card import AUTO_CLASSES, write_card
from lmssl.errors import CheckpointError, ExportError
from lmssl.model.build import SPAN_KINDS, build_recipe_model
from lmssl.model.electra import ElectraPair
from lmssl.model.encoder import ROBERTA_KINDS
from lmssl.recipe.load import load_recipe
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What an export takes from a tokenizer folder; nothing else travels."""

LOGITS_TOLERANCE = 1e-4
"""Largest difference of float32 logits between the checkpoint and the export; document and stock attention differ in
the order of summation."""

VERIFY = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
folder, out = sys.argv[1], sys.argv[2]
probe = json.load(open(sys.argv[3], encoding="utf-8"))
auto_class = getattr(transformers, probe["auto_class"])
model = auto_class.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
with torch.no_grad():
    output = model(**{name: torch.tensor([ids]) for name, ids in probe["inputs"].items()})
logits = torch.cat([output[name].float().flatten() for name in output if name.endswith("logits")])
ids = torch.tensor(tokenizer(probe["text"], add_special_tokens=False)["input_ids"])
count = torch.tensor(sum(p.numel() for p in model.parameters()))
assert "lmssl" not in sys.modules
save_file({"logits": logits, "text_ids": ids, "num_parameters": count}, out)
"""


@dataclass(frozen=True)
class Exported:
    """An export that was written and verified."""

    path: Path
    step: int
    max_logits_difference: float
    num_parameters: int
    """Of the model in the folder itself; ELECTRA's generator stands in a folder inside it."""


def export_run(
    run: Path, step: int | None, out: Path, report: Callable[[str], None] = print, *, ema: bool = False
) -> Exported:
    """Export a run's checkpoint as a transformers folder and prove it in a process that never imports lmssl.

    Args:
        run: a run folder.
        step: which checkpoint; None is the newest.
        out: folder to create; it must not exist or be empty.
        ema: export the moving average of the weights instead of the weights.
    Raises:
        CheckpointError: no valid checkpoint, or none with averages.
        ExportError: `out` is taken or not writable, or the reloaded model differs from the checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not empty", where="--out", remedy="choose another folder or remove it")
    found = checkpoint.find_step(run, step)
    kind = load_recipe(found.path / "recipe.yaml").recipe.objective.kind
    model = load_model(found, ema=ema)
    tokenizer = load_tokenizer(run / "tokenizer")
    partial = out.parent / f".tmp-{out.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        parts = _parts(model, kind)
        for part in parts:
            (partial / part.folder).mkdir(exist_ok=True)
            _write(part.model, tokenizer, partial / part.folder)
        differences = [
            _verify(part.model, tokenizer, partial / part.folder, auto_class=part.auto_class) for part in parts
        ]
        num_parameters, difference = parts[0].model.num_parameters(), max(differences)
        write_card(partial, run=run, found=found, num_parameters=num_parameters, ema=ema)
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ExportError(
            f"the export could not be written: {error}", where=str(out), remedy="choose another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"exported step {found.step} to {out}: {num_parameters:,} parameters")
    for part in parts[1:]:
        report(f"and {part.folder} to {out / part.folder}: {part.model.num_parameters():,} parameters")
    report(f"reloaded in a fresh process; largest difference of logits {difference:.1e}")
    return Exported(out, found.step, difference, num_parameters)


@dataclass(frozen=True)
class _Part:
    """A stock model of an export."""

    folder: str
    """Inside the export; empty: the export itself."""
    model: PreTrainedModel
    auto_class: str
    """What loads it."""


def _parts(model: PreTrainedModel, kind: str) -> list[_Part]:
    if isinstance(model, ElectraPair):
        return [
            _Part("", model.discriminator, AUTO_CLASSES[kind]),
            _Part("generator", model.generator, AUTO_CLASSES["masked"]),
        ]
    if isinstance(model, BertForPreTraining):  # also what it knows of sentences, which AutoModelForMaskedLM leaves out
        return [_Part("", model, "AutoModelForPreTraining")]
    return [_Part("", model, AUTO_CLASSES[kind])]


def load_model(found: checkpoint.Checkpoint, *, ema: bool = False) -> PreTrainedModel:
    """The model of a checkpoint, in float32 on CPU; with `ema`, of the averages of its weights.

    Raises:
        CheckpointError: averages are wanted and the run kept none.
    """
    config = AutoConfig.for_model(**json.loads(found.text("config.json")))
    recipe = load_recipe(found.path / "recipe.yaml").recipe
    model = build_recipe_model(recipe, config)
    if ema and recipe.train.ema_decay is None:
        raise CheckpointError(
            "the run kept no moving average of its weights",
            where=str(found.path),
            remedy="export without --ema; train.ema_decay=0.999 keeps one in a new run",
        )
    name = checkpoint.AVERAGES if ema else "model.safetensors"
    checkpoint.load_weights(model, found.tensors(name), where=str(found.path))
    model.eval()
    return model


def _write(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights, config, generation config and tokenizer, in the form that transformers 4 and 5 read alike."""
    config = model.config
    if model.can_generate():
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in names})
    disable_progress_bar()
    model.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 and vLLM read these two at the top level and fall back to 10000 and float32 without a word.
    rope = written.get("rope_parameters") or {}
    if "rope_theta" in rope:
        written["rope_theta"] = rope["rope_theta"]
    if config.model_type == "modernbert":  # version 4 knows its layers and rotations by these names only
        layers = written["layer_types"]
        rest = (i for i, kind in enumerate(layers) if i and kind == "full_attention")
        written["global_attn_every_n_layers"] = next(rest, len(layers))
        written["global_rope_theta"] = rope["full_attention"]["rope_theta"]
        written["local_rope_theta"] = rope["sliding_attention"]["rope_theta"]
    written["torch_dtype"] = written.get("dtype", "float32")
    written["architectures"] = [type(model).__name__]
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer.path / name).exists():
            shutil.copyfile(tokenizer.path / name, folder / name)
    accepted = set(inspect.signature(model.forward).parameters)
    _fix_tokenizer_config(folder, max_length=_max_tokens(config), accepted=accepted)


def _max_tokens(config: Any) -> int | None:
    """The longest text a model reads, special tokens included; None: no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if config.model_type in ROBERTA_KINDS and positions is not None:
        return positions - int(config.pad_token_id) - 1  # its positions begin after that of padding
    if config.model_type in SPAN_KINDS:
        return None
    return positions or getattr(config, "n_positions", None)


def _fix_tokenizer_config(folder: Path, *, max_length: int | None, accepted: Collection[str]) -> None:
    """`TokenizersBackend` is a transformers 5 name that version 4 refuses; the class below loads in both.

    Args:
        max_length: tokens.
        accepted: what the model's forward takes; a tokenizer must not give it more.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if max_length is not None:
        config["model_max_length"] = max_length
    names = config.get("model_input_names", ["input_ids", "attention_mask"])
    config["model_input_names"] = [name for name in names if name in accepted]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    specials = {k: v for k, v in config.items() if k.endswith("_token") and k != "add_prefix_token" and v is not None}
    if not (folder / "special_tokens_map.json").exists():
        text = json.dumps(specials, indent=2, ensure_ascii=False) + "\n"
        (folder / "special_tokens_map.json").write_text(text, encoding="utf-8")


def _verify(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, *, auto_class: str) -> float:
    """Logits, parameter count and token ids of a fresh process against ours; returns the largest logits difference."""
    text = "The quick brown fox jumps over 13 lazy dogs.\n\tdef naïve(): return '漢字'"
    text_ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    ids = text_ids[: _max_tokens(model.config)]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = [model.config.decoder_start_token_id, *ids[:-1]]
    folder = folder.resolve()  # the child works inside it
    probe, result = folder / ".probe.json", folder / ".probe.safetensors"
    probe.write_text(json.dumps({"auto_class": auto_class, "inputs": inputs, "text": text}), encoding="utf-8")
    command = [sys.executable, "-c", VERIFY, str(folder), str(result), str(probe)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode != 0:
        raise ExportError(
            f"a fresh process could not load the export:\n{done.stderr.strip()[-2000:]}",
            where=str(folder),
            remedy="check that transformers is intact; the checkpoint is unharmed",
        )
    theirs = load_file(result)
    probe.unlink()
    result.unlink()
    with torch.no_grad():
        output = model(**{name: torch.tensor([value]) for name, value in inputs.items()})
    ours = torch.cat([output[name].float().flatten() for name in output if name.endswith("logits")])
    difference = float((ours - theirs["logits"]).abs().max())
    problems = []
    if not difference <= LOGITS_TOLERANCE:
        problems.append(f"logits differ by {difference:.3g}")
    if int(theirs["num_parameters"]) != model.num_parameters():
        problems.append(f"{int(theirs['num_parameters'])} parameters instead of {model.num_parameters()}")
    if theirs["text_ids"].tolist() != text_ids:
        problems.append("the tokenizer gives other ids")
    if problems:
        raise ExportError(
            f"the reloaded export differs from the checkpoint: {'; '.join(problems)}",
            where=str(folder),
            remedy="report this with the recipe; nothing was written",
        )
    return difference

"""From a checkpoint to a folder that stock transformers loads, proven in a fresh process before it appears."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lmssl import checkpoint
from lmssl.card import write_card
from lmssl.errors import ExportError
from lmssl.model.build import build_model
from lmssl.recipe.load import load_recipe
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What an export takes from a tokenizer folder; nothing else travels."""

LOGITS_TOLERANCE = 1e-4
"""Largest difference of float32 logits between the checkpoint and the export; document and stock attention differ in
the order of summation."""

VERIFY = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1], sys.argv[2]
probe = json.load(open(sys.argv[3], encoding="utf-8"))
model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([probe["ids"]])).logits[0].float()
ids = torch.tensor(tokenizer(probe["text"], add_special_tokens=False)["input_ids"])
count = torch.tensor(sum(p.numel() for p in model.parameters()))
assert "lmssl" not in sys.modules
save_file({"logits": logits.contiguous(), "text_ids": ids, "num_parameters": count}, out)
"""


@dataclass(frozen=True)
class Exported:
    """An export that was written and verified."""

    path: Path
    step: int
    max_logits_difference: float
    num_parameters: int


def export_run(run: Path, step: int | None, out: Path, report: Callable[[str], None] = print) -> Exported:
    """Export a run's checkpoint as a transformers folder and prove it in a process that never imports lmssl.

    Args:
        run: a run folder.
        step: which checkpoint; None is the newest.
        out: folder to create; it must not exist or be empty.
    Raises:
        CheckpointError: no valid checkpoint.
        ExportError: `out` is taken or not writable, or the reloaded model differs from the checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not empty", where="--out", remedy="choose another folder or remove it")
    found = checkpoint.find_step(run, step)
    model = load_model(found)
    tokenizer = load_tokenizer(run / "tokenizer")
    partial = out.parent / f".tmp-{out.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(model, tokenizer, partial)
        difference = _verify(model, tokenizer, partial)
        write_card(partial, run=run, found=found, num_parameters=model.num_parameters())
        for path in partial.iterdir():
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
    report(f"exported step {found.step} to {out}: {model.num_parameters():,} parameters")
    report(f"reloaded in a fresh process; largest difference of logits {difference:.1e}")
    return Exported(out, found.step, difference, model.num_parameters())


def load_model(found: checkpoint.Checkpoint) -> PreTrainedModel:
    """The stock model of a checkpoint, in float32 on CPU."""
    config = AutoConfig.for_model(**json.loads(found.text("config.json")))
    model = build_model(config, seed=load_recipe(found.path / "recipe.yaml").recipe.seed)
    checkpoint.load_weights(model, found.tensors("model.safetensors"), where=str(found.path))
    model.eval()
    return model


def _write(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights, config, generation config and tokenizer, in the form that transformers 4 and 5 read alike."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    disable_progress_bar()
    model.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 and vLLM read these two at the top level and fall back to 10000 and float32 without a word.
    rope = written.get("rope_parameters") or {}
    if "rope_theta" in rope:
        written["rope_theta"] = rope["rope_theta"]
    written["torch_dtype"] = written.get("dtype", "float32")
    written["architectures"] = [type(model).__name__]
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer.path / name).exists():
            shutil.copyfile(tokenizer.path / name, folder / name)
    _fix_tokenizer_config(folder, max_length=_max_positions(config))


def _max_positions(config: Any) -> int | None:
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _fix_tokenizer_config(folder: Path, *, max_length: int | None) -> None:
    """`TokenizersBackend` is a transformers 5 name that version 4 refuses; the class below loads in both."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if max_length is not None:
        config["model_max_length"] = max_length
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    specials = {k: v for k, v in config.items() if k.endswith("_token") and k != "add_prefix_token" and v is not None}
    if not (folder / "special_tokens_map.json").exists():
        text = json.dumps(specials, indent=2, ensure_ascii=False) + "\n"
        (folder / "special_tokens_map.json").write_text(text, encoding="utf-8")


def _verify(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> float:
    """Logits, parameter count and token ids of a fresh process against ours; returns the largest logits difference."""
    text = "The quick brown fox jumps over 13 lazy dogs.\n\tdef naïve(): return '漢字'"
    text_ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    ids = text_ids[: _max_positions(model.config)]
    folder = folder.resolve()  # the child works inside it
    probe, result = folder / ".probe.json", folder / ".probe.safetensors"
    probe.write_text(json.dumps({"ids": ids, "text": text}), encoding="utf-8")
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
        ours = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
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

"""`lmssl export`: a checkpoint as a folder that appears when everything in it is proven."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import BertForPreTraining, PreTrainedModel

from lmssl import checkpoint
from lmssl.card import AUTO_CLASSES, write_card
from lmssl.card.facts import Facts
from lmssl.errors import ExportError
from lmssl.export.gguf_file import check_gguf, verify_gguf, write_gguf
from lmssl.export.onnx_file import check_onnx, write_onnx
from lmssl.export.stock import MAX_SHARD_SIZE, write_stock
from lmssl.export.verify import Probe, verify
from lmssl.export.weights import ExportWeights, load_chosen, round_to
from lmssl.model.electra import ElectraPair
from lmssl.recipe.load import load_recipe
from lmssl.release.marker import run_identity, source_of, write_marker
from lmssl.release.private import findings
from lmssl.tokenizer.load import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Exported:
    """An export that was written and verified."""

    path: Path
    step: int
    max_logits_difference: float
    """Between the checkpoint and the export as a fresh process read it."""
    num_parameters: int
    """Of the model in the folder itself; ELECTRA's generator stands in a folder inside it."""


def export_run(
    run: Path,
    step: int | None,
    out: Path,
    report: Callable[[str], None] = print,
    *,
    ema: bool = False,
    weights: ExportWeights | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    gguf: bool = False,
    onnx: bool = False,
    private: Sequence[str] = (),
) -> Exported:
    """Export a run's checkpoint as a transformers folder and prove it in a process that never imports lmssl.

    Args:
        run: a run folder.
        step: which checkpoint; None is the newest.
        out: folder to create; it must not exist or be empty.
        ema: short for `weights=ExportWeights(ema=True)`.
        weights: which weights, rounded to what; None: those of the checkpoint as they are.
        max_shard_size: of one file of weights, such as 5GB.
        gguf: also write a file for llama.cpp.
        onnx: also write a file for onnxruntime, in float32.
        private: words that must not be in any file, beside what is always looked for.
    Raises:
        CheckpointError: no valid checkpoint, too few to average, or none with averages.
        ExportError: `out` is taken or not writable, or the reloaded model differs from the checkpoint.
    """
    weights = weights or ExportWeights(ema=ema)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not empty", where="--out", remedy="choose another folder or remove it")
    found = checkpoint.find_step(run, step)
    recipe = load_recipe(found.path / "recipe.yaml").recipe
    tokenizer = load_tokenizer(run / "tokenizer")
    partial = out.parent / f".tmp-{out.name}"
    parts = _parts(load_chosen(run, found, weights), recipe.objective.kind)
    split = _check_formats(parts[0].model, tokenizer, gguf=gguf, onnx=onnx)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        difference = max(
            _write_part(part, tokenizer, partial, dtype=weights.dtype, max_shard_size=max_shard_size) for part in parts
        )
        if gguf:
            difference = max(difference, _write_gguf(parts[0].model, tokenizer, partial, recipe.name, split, weights))
        if onnx:
            difference = max(difference, write_onnx(parts[0].model, partial / "onnx" / "model.onnx"))
        _describe(partial, Facts(run, found, parts[0].model.num_parameters(), asdict(weights)), private)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ExportError(
            f"the export could not be written: {error}", where=str(out), remedy="choose another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report(report, out, found.step, parts, difference)
    return Exported(out, found.step, difference, parts[0].model.num_parameters())


def _check_formats(model: PreTrainedModel, tokenizer: Tokenizer, *, gguf: bool, onnx: bool) -> str:
    """Refuse what cannot be written; returns what llama.cpp calls the way the tokenizer splits text."""
    if onnx:
        check_onnx(model)
    return check_gguf(model, tokenizer) if gguf else ""


def _report(report: Callable[[str], None], out: Path, step: int, parts: list[_Part], difference: float) -> None:
    report(f"exported step {step} to {out}: {parts[0].model.num_parameters():,} parameters")
    for part in parts[1:]:
        report(f"and {part.folder} to {out / part.folder}: {part.model.num_parameters():,} parameters")
    report(f"reloaded in a fresh process; largest difference of logits {difference:.1e}")


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


def _write_part(part: _Part, tokenizer: Tokenizer, folder: Path, *, dtype: str, max_shard_size: str) -> float:
    """Write and verify; returns the largest difference of logits."""
    folder, model = folder / part.folder, part.model
    folder.mkdir(exist_ok=True)
    exact = Probe.of(model, tokenizer).logits(model)
    round_to(model, dtype)
    write_stock(model, tokenizer, folder, max_shard_size=max_shard_size)
    round_to(model, "float32")
    return verify(model, tokenizer, folder, auto_class=part.auto_class, exact=exact, dtype=dtype)


def _write_gguf(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, name: str, split: str, weights: ExportWeights
) -> float:
    path = folder / f"{name}.gguf"
    round_to(model, weights.dtype)
    write_gguf(model, tokenizer, path, name=name, split=split)
    round_to(model, "float32")
    return verify_gguf(model, tokenizer, path)


def _describe(folder: Path, facts: Facts, private: Sequence[str]) -> None:
    """Card, marker and the search for what is private; then everybody may read the files."""
    write_card(folder, facts)
    source = source_of(facts.found.path, facts.weights)
    write_marker(folder, {"identity": run_identity(facts.run), "name": facts.recipe.name, "source": source})
    _check_private(folder, private)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def _check_private(folder: Path, words: Sequence[str]) -> None:
    found = list(findings(folder, words))
    if found:
        raise ExportError(
            f"something private would be written: {'; '.join(found[:3])}",
            where="the recipe or the tokenizer",
            remedy="take it out there; nothing was written",
        )

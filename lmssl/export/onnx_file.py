"""An ONNX file for onnxruntime and its like: ids and mask in, logits out, for any number and length of texts."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmssl.errors import ExportError
from lmssl.export.stock import max_tokens

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

TOLERANCE = 1e-4
"""Largest difference of float32 logits between torch and onnxruntime."""

_LARGEST_WHOLE_BYTES = 1_500_000_000
"""Above, weights stand in a file beside the graph: a protobuf holds less than 2 GiB."""


class _Logits(nn.Module):
    """What the file computes: no cache, no dictionaries."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask (B, T) -> logits (B, T, V)."""
        cache = {"use_cache": False} if self.model.can_generate() else {}
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **cache)[0]
        return logits


def check_onnx(model: PreTrainedModel) -> None:
    """Whether a model can be written.

    Raises:
        ExportError: a package is missing, or the model takes more than ids and a mask.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"an ONNX file takes {' and '.join(missing)}", where="--onnx", remedy=f"pip install {' '.join(missing)}"
        )
    if model.config.is_encoder_decoder:
        raise ExportError(
            f"a {model.config.model_type} model reads two texts and is not written as ONNX",
            where="--onnx",
            remedy="leave it out; optimum exports such models in several files",
        )


def write_onnx(model: PreTrainedModel, path: Path) -> float:
    """Write and run; returns the largest difference of logits, over two shapes, with padding on both sides.

    Args:
        model: in float32, with any attention; the file holds torch's own, which minds the mask.
    Raises:
        ExportError: onnxruntime gives other logits than the model with its plainest attention.
    """
    module = _Logits(model).eval()
    length = min(16, max_tokens(model.config) or 16)
    example = _example(2, length, model.config.vocab_size)
    with _stock_attention(model, "sdpa"):
        program = _program(module, example)
    path.parent.mkdir(exist_ok=True)
    large = 4 * sum(parameter.numel() for parameter in model.parameters()) > _LARGEST_WHOLE_BYTES
    program.save(str(path), external_data=large)
    with _stock_attention(model, "eager"):
        return _verify(module, path, (example, _example(3, length - 5, model.config.vocab_size)))


@contextmanager
def _stock_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """One of transformers' own attentions in all parts, "eager" in those that know no other."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [str(part.config._attn_implementation) for part in parts]
    try:
        for part in parts:
            try:
                part.set_attn_implementation(name)
            except ValueError:
                part.set_attn_implementation("eager")
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.set_attn_implementation(own)


def _program(module: nn.Module, example: dict[str, Tensor]) -> Any:
    """What the exporter makes of a module, without paths of this machine."""
    shapes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")} for name in example}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own insides; the result is compared below
            program = torch.onnx.export(
                module, (), kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False,
                input_names=list(example), output_names=["logits"],
            )  # fmt: skip
    except Exception as error:  # the exporter raises whatever it meets
        raise ExportError(
            f"torch cannot write this model as ONNX: {str(error).strip().splitlines()[0][:200]}",
            where="--onnx",
            remedy="leave it out",
        ) from error
    finally:
        logging.disable(before)
    if program is None:
        raise ExportError("torch wrote no ONNX program", where="--onnx", remedy="leave it out")
    _strip(program.model)
    return program


def _strip(program: Any) -> None:
    """Remove what the exporter notes beside each node: source lines with the paths of this machine."""
    program.metadata_props.clear()
    for graph in (program.graph, *program.functions.values()):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in graph.inputs:
            value.metadata_props.clear()
    for value in program.graph.initializers.values():
        value.metadata_props.clear()


def _example(num_texts: int, length: int, vocab_size: int) -> dict[str, Tensor]:
    ids = (torch.arange(num_texts * length).reshape(num_texts, length) * 7 + 5) % vocab_size
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _verify(module: nn.Module, path: Path, examples: tuple[dict[str, Tensor], ...]) -> float:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for example in examples:
        with torch.no_grad():
            wanted = module(**example)
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in example.items()})
        inside = example["attention_mask"].bool()  # what stands at padding is nobody's
        difference = (torch.from_numpy(np.asarray(found)) - wanted)[inside].abs().max()
        largest = max(largest, float(difference))
    if not largest <= TOLERANCE:
        raise ExportError(
            f"onnxruntime gives other logits: they differ by {largest:.3g}",
            where=str(path),
            remedy="export without --onnx, and report this with the recipe; nothing was written",
        )
    return largest

"""An export, loaded by a process that never imports lmssl, against the model it was written from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForPreTraining, ElectraForPreTraining, PreTrainedModel

from lmssl.errors import ExportError
from lmssl.export.stock import max_tokens
from lmssl.tokenizer.load import Tokenizer

LOGITS_TOLERANCE = 1e-4
"""Largest difference of float32 logits, and of the loss, between what was written and what was read; document and stock
attention differ in the order of summation."""

ROUNDING_TOLERANCE = {"float32": 0.0, "bfloat16": 0.1, "float16": 0.02}
"""How far rounding the weights may move a logit, as a share of the largest logit. A bfloat16 keeps 8 bits, a float16
11; what the layers make of it is measured, and these leave it about five-fold room."""

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
loss = output["loss"].double()
ids = torch.tensor(tokenizer(probe["text"], add_special_tokens=False)["input_ids"])
count = torch.tensor(sum(p.numel() for p in model.parameters()))
assert "lmssl" not in sys.modules
save_file({"logits": logits, "loss": loss, "text_ids": ids, "num_parameters": count}, out)
"""

TEXT = "The quick brown fox jumps over 13 lazy dogs.\n\tdef naïve(): return '漢字'"


@dataclass(frozen=True)
class Probe:
    """A text as a model reads it."""

    text_ids: list[int]
    """All ids of the text, as the tokenizer gives them."""
    inputs: dict[str, list[int]]
    """What the class's forward takes, labels included, so that its own loss is compared as well."""

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: Tokenizer) -> Probe:
        """The text above, as long as the model reads."""
        text_ids = tokenizer.backend.encode(TEXT, add_special_tokens=False).ids
        ids = text_ids[: max_tokens(model.config)]
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = [model.config.decoder_start_token_id, *ids[:-1]]
        # Of every kind some labels that are in its range: of tokens, of pairs of sentences, of replaced tokens.
        detector = isinstance(model, ElectraForPreTraining)
        inputs["labels"] = [place % 2 for place in range(len(ids))] if detector else ids
        if isinstance(model, BertForPreTraining):
            inputs["next_sentence_label"] = [1]
        return Probe(text_ids, inputs)

    def logits(self, model: PreTrainedModel) -> Tensor:
        """What a model in float32 gives, flat."""
        return self.answers(model)[0]

    def answers(self, model: PreTrainedModel) -> tuple[Tensor, float]:
        """Logits of a model in float32, flat, and its class's own loss."""
        with torch.no_grad():
            output = model(**{name: torch.tensor([value]) for name, value in self.inputs.items()})
        logits = torch.cat([output[name].float().flatten() for name in output if name.endswith("logits")])
        return logits, float(output["loss"])


def verify(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, *, auto_class: str, exact: Tensor, dtype: str
) -> float:
    """Logits, loss, parameter count and token ids of a fresh process against ours; returns the largest difference.

    Args:
        model: with the weights that were written, in float32.
        exact: logits before the weights were rounded.
        dtype: the type they were rounded to.
    Raises:
        ExportError: the folder does not load, or differs.
    """
    probe = Probe.of(model, tokenizer)
    theirs = _read_afresh(probe, folder.resolve(), auto_class)
    ours, loss = probe.answers(model)
    difference = float((ours - theirs["logits"]).abs().max())
    rounding, room = float((ours - exact).abs().max()), ROUNDING_TOLERANCE[dtype] * float(exact.abs().max())
    problems = []
    if not difference <= LOGITS_TOLERANCE:
        problems.append(f"logits differ by {difference:.3g}")
    if not abs(float(theirs["loss"]) - loss) <= LOGITS_TOLERANCE:
        problems.append(f"its loss is {float(theirs['loss']):.6g} instead of {loss:.6g}")
    if not rounding <= room:
        problems.append(f"{dtype} moves logits by {rounding:.3g}, more than {room:.3g}; choose another --dtype")
    if int(theirs["num_parameters"]) != model.num_parameters():
        problems.append(f"{int(theirs['num_parameters'])} parameters instead of {model.num_parameters()}")
    if theirs["text_ids"].tolist() != probe.text_ids:
        problems.append("the tokenizer gives other ids")
    if problems:
        raise ExportError(
            f"the reloaded export differs from the checkpoint: {'; '.join(problems)}",
            where=str(folder),
            remedy="report this with the recipe; nothing was written",
        )
    return max(difference, rounding)


def _read_afresh(probe: Probe, folder: Path, auto_class: str) -> dict[str, Tensor]:
    question, result = folder / ".probe.json", folder / ".probe.safetensors"
    content = {"auto_class": auto_class, "inputs": probe.inputs, "text": TEXT}
    question.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-c", VERIFY, str(folder), str(result), str(question)]
    # The child works inside the folder, where no module of ours can be found by its name.
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode != 0:
        raise ExportError(
            f"a fresh process could not load the export:\n{done.stderr.strip()[-2000:]}",
            where=str(folder),
            remedy="check that transformers is intact; the checkpoint is unharmed",
        )
    found = load_file(result)
    question.unlink()
    result.unlink()
    return found

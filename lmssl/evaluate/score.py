"""How likely texts are to a model: rows in, summed nats out, the same for any batch size and number of processes.

Shapes: B rows of a batch, T tokens of the longest of them, C targets of the one that has most, N = B * C, D width,
V vocabulary, R rows altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lmssl.model.attention import document_kwargs
from lmssl.model.encoder import encode, masked_head
from lmssl.model.head import IGNORE, chunk_size, output_weight
from lmssl.objective.masked import at_targets

IntArray = npt.NDArray[np.int64]

_MAX_LOGITS = 1 << 28
"""Entries of the logits that a class unknown here makes at once: 1 GiB."""


class Row(NamedTuple):
    """What one row of a forward reads and predicts."""

    ids: IntArray
    """What the model reads."""
    places: IntArray
    """Where in the row the targets are predicted."""
    targets: IntArray
    """What stands there, or with a causal model behind it."""


class Scores(NamedTuple):
    """Of every row, in the order the rows were given."""

    nats: npt.NDArray[np.float64]
    """Summed negative log-likelihood of its targets."""
    num_right: IntArray
    """Targets whose logit no other token's reaches."""


def score_rows(
    module: nn.Module,
    rows: Sequence[Row],
    accelerator: Accelerator,
    *,
    causal: bool,
    batch_tokens: int,
    go_on: Callable[[], bool] = lambda: True,
) -> Scores | None:
    """Score rows under a model, long ones together; every process must call with the same rows.

    Processes run equally many forwards, as fully sharded models need it, and each row is scored by one of them.

    Args:
        module: a stock model, or a `LossModule` or what wraps one; it is left in the mode it came in.
        causal: whether the model reads from left to right.
        batch_tokens: tokens of a forward, padding included; a longer row goes alone.
        go_on: asked before each forward, and must answer the same on every rank; after a no the result is None.
    """
    model = _stock(module)
    if not _is_known(model):
        batch_tokens = min(batch_tokens, _MAX_LOGITS // model.config.vocab_size)
    batches = list(_batches(rows, batch_tokens))
    world_size, rank = accelerator.num_processes, accelerator.process_index
    found = torch.zeros(2, len(rows), dtype=torch.float64)
    was_training = module.training
    module.eval()
    function = partial(_row_scores, causal=causal)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for number in range(rank, -(-len(batches) // world_size) * world_size, world_size):
                if not go_on():
                    return None
                batch = batches[number % len(batches)]
                inputs = row_tensors([rows[i] for i in batch], model.config.pad_token_id or 0)
                inputs = {name: tensor.to(accelerator.device) for name, tensor in inputs.items()}
                scored = function(model, inputs) if model is module else module(inputs, function)
                if number < len(batches):
                    found[0, batch] = scored["nats_B"].cpu()
                    found[1, batch] = scored["right_B"].cpu()
    finally:
        module.train(was_training)
    if world_size > 1:
        found = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
    return Scores(found[0].numpy(), found[1].to(torch.int64).numpy())


def _stock(module: nn.Module) -> PreTrainedModel:
    """The stock model inside wrappers."""
    if isinstance(module, PreTrainedModel):
        return module
    return next(part for part in module.modules() if isinstance(part, PreTrainedModel))


def _is_known(model: PreTrainedModel) -> bool:
    """Whether body and head are called apart, as in training."""
    return bool(model.config._attn_implementation == "document")


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of about one length, the longest first, so that a lack of memory shows at once."""
    order = iter(sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i)))
    while first := list(islice(order, 1)):
        room = batch_tokens // max(1, len(rows[first[0]].ids))
        yield first + list(islice(order, max(0, room - 1)))


def row_tensors(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Rows padded at their ends."""
    length = max(1, *(len(row.ids) for row in rows))
    most = max(1, *(len(row.places) for row in rows))
    ids_BT = np.full((len(rows), length), pad_id, np.int64)
    segments_BT = np.zeros((len(rows), length), np.int32)
    places_BC = np.zeros((len(rows), most), np.int64)
    targets_BC = np.full((len(rows), most), IGNORE, np.int64)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row.ids)] = row.ids
        segments_BT[number, : len(row.ids)] = 1
        places_BC[number, : len(row.places)] = row.places
        targets_BC[number, : len(row.places)] = row.targets
    arrays = {"ids_BT": ids_BT, "segments_BT": segments_BT, "places_BC": places_BC, "targets_BC": targets_BC}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _row_scores(model: PreTrainedModel, inputs: dict[str, Tensor], *, causal: bool) -> dict[str, Tensor]:
    """Nats and right predictions of each row."""
    places_BC, targets_BC = inputs["places_BC"], inputs["targets_BC"]
    targets_N = targets_BC.reshape(-1)
    logits, states_ND, vocab_size = logits_of(model, inputs, places_BC, causal=causal)
    chunk = chunk_size(len(targets_N), vocab_size)
    nats, right = [], []
    for start in range(0, len(targets_N), chunk):
        part = slice(start, start + chunk)
        logits_NV, picked_N = logits(states_ND[part]), targets_N[part]
        kept_N = picked_N != IGNORE
        nats.append(F.cross_entropy(logits_NV, picked_N, ignore_index=IGNORE, reduction="none").double())
        at_target_N1 = logits_NV.gather(1, torch.where(kept_N, picked_N, 0)[:, None])
        right.append(((logits_NV >= at_target_N1).sum(-1) == 1) & kept_N)
    shape = places_BC.shape
    return {"nats_B": torch.cat(nats).view(shape).sum(1), "right_B": torch.cat(right).view(shape).sum(1).double()}


def logits_of(
    model: PreTrainedModel, inputs: dict[str, Tensor], places_BC: Tensor, *, causal: bool
) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
    """What makes float32 logits of states, the states at the targets [N, D], and the size of the vocabulary.

    With a class unknown here the states are its own logits.
    """
    ids_BT, segments_BT = inputs["ids_BT"], inputs["segments_BT"]
    offsets_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    if not _is_known(model):
        kwargs = {"use_cache": False} if causal else {}
        logits_BTV = model(input_ids=ids_BT, attention_mask=segments_BT.long(), **kwargs).logits
        return torch.Tensor.float, at_targets(logits_BTV, places_BC), logits_BTV.shape[-1]
    if causal:
        # Padding stands behind everything that is predicted, where nothing sees it.
        sees = document_kwargs(segments_BT, causal=True, documents=False)
        body = model.base_model(input_ids=ids_BT, position_ids=offsets_BT, attention_mask=None, use_cache=False, **sees)
        weight_VD = output_weight(model)
        states_ND = at_targets(body.last_hidden_state, places_BC)
        weight = weight_VD.to(states_ND.dtype)
        return lambda states: (states @ weight.t()).float(), states_ND, weight_VD.shape[0]
    head = masked_head(model)
    states_ND = head.transform(encode(model, ids_BT, segments_BT, offsets_BT, places_BC=places_BC).flatten(0, 1))
    weight, bias = head.weight_VD.to(states_ND.dtype), head.bias_V

    def logits(states: Tensor) -> Tensor:
        found = (states @ weight.t()).float()
        return found if bias is None else found + bias.float()

    return logits, states_ND, head.weight_VD.shape[0]

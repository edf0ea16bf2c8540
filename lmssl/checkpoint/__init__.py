"""Checkpoints: written whole or not at all, found only when whole, one format for every backend and world size.

::

    RUN/checkpoints/step-00000500/
        model.safetensors    every weight once, float32, full shape, by the stock model's parameter names
        optim.safetensors    `<state>/<parameter>`
        ema.safetensors      with `train.ema_decay`: the moving average of every weight, named as in the group model
        state.json  ledger.jsonl  recipe.yaml  config.json
        manifest.json        what was saved, by what, and size and checksums of each file; written last

Several ranks write `model-00001-of-00002.safetensors` and so on, each the tensors that it owns; a reader sees one group
of named tensors, whatever wrote it. A folder without a manifest that matches is no checkpoint. No pickle is read or
written.
"""

from lmssl.checkpoint.folder import (
    FORMAT,
    Checkpoint,
    checkpoints_path,
    discard_after,
    find_latest,
    find_step,
    step_folders,
    sync_folder,
    validate,
    write_synced,
)
from lmssl.checkpoint.keep import Keep, prune
from lmssl.checkpoint.protocol import Groups, Meeting
from lmssl.checkpoint.saver import Saved, Saver
from lmssl.checkpoint.space import check_space
from lmssl.checkpoint.tensors import load_weights, owners

__all__ = [
    "FORMAT",
    "Checkpoint",
    "Groups",
    "Keep",
    "Meeting",
    "Saved",
    "Saver",
    "check_space",
    "checkpoints_path",
    "discard_after",
    "find_latest",
    "find_step",
    "load_weights",
    "owners",
    "prune",
    "step_folders",
    "sync_folder",
    "validate",
    "write_synced",
]

"""Named tensors: which rank owns which, out of a model and back into it, into files and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lmssl.checkpoint.checksums import CHECKSUMS
from lmssl.errors import CheckpointError
from lmssl.optim import exchange

_CHUNK_BYTES = 2**24
"""What is checked, hashed and written at once: it should stay in the processor's cache."""


def owners(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The rank that owns each named tensor: a pure function, balanced by size.

    Args:
        sizes: of tensors by name, in any unit.

    >>> owners({"embedding": 10, "a": 4, "b": 4, "c": 2}, 2)
    {'embedding': 0, 'a': 1, 'b': 1, 'c': 1}
    """
    return dict(zip(sizes, exchange.owners(list(sizes.values()), num_ranks), strict=True))


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy weights by name into a model.

    Raises:
        CheckpointError: names or shapes differ; names the first that does.
    """
    named = dict(model.named_parameters())
    differing = sorted(set(named) ^ set(tensors))
    differing += [name for name in named if name in tensors and named[name].shape != tensors[name].shape]
    if differing:
        raise CheckpointError(
            f"weights do not fit the model: {differing[0]!r} and {len(differing) - 1} more differ in name or shape",
            where=where,
            remedy="use the recipe this checkpoint was made with",
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])


class TensorFiles(Mapping[str, Tensor]):
    """Named tensors of several safetensors files as one mapping; each is read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"its tensors cannot be read: {error}",
                    where=str(path),
                    remedy="`lmssl verify` says which checkpoints are whole",
                ) from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write float32 tensors as a safetensors file and wait until it is on the disk; returns its size and checksums.

    In one pass over the memory, outside the interpreter's lock, so that training goes on beside it; `safetensors.save`
    holds the lock and leaves the checksums to a second pass.

    Raises:
        CheckpointError: a number is not finite; names the tensor.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}; checkpoints hold float32 from CPU")
        end = start + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digests = {name: begin() for name, begin in CHECKSUMS.items()}
    for digest in digests.values():
        digest.update(head)
    with path.open("wb", buffering=0) as file:
        file.write(head)
        for name, tensor in tensors.items():
            numbers = tensor.contiguous().numpy().reshape(-1)
            for first in range(0, numbers.size, _CHUNK_BYTES // 4):
                chunk = numbers[first : first + _CHUNK_BYTES // 4]
                if not np.isfinite(chunk).all():
                    raise CheckpointError(
                        f"{name} holds numbers that are not finite, and such a checkpoint is never written",
                        remedy="lower optim.lr, or lengthen schedule.warmup_tokens",
                    )
                data = chunk.view(np.uint8).data
                for digest in digests.values():
                    digest.update(data)
                while data:  # an unbuffered write may take less
                    data = data[file.write(data) :]
        os.fsync(file.fileno())
        checksums = {name: digest.hexdigest() for name, digest in digests.items()}
        return {"size": os.fstat(file.fileno()).st_size, **checksums}

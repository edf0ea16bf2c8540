"""Which matrices a weight holds: some stock classes keep several projections in one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmssl.errors import ModelError


@dataclass(frozen=True)
class Parts:
    """How a weight is cut into matrices along the dimension of its outputs."""

    dim: int = 0
    """Of the outputs: 0 in `nn.Linear`, 1 in `Conv1D`."""
    sizes: tuple[int, ...] = ()
    """Outputs of each matrix, or of each one's share in a repetition; none: the weight is one matrix."""
    repeats: int = 1
    """How often the sizes follow one another: of GPT-NeoX, once for each head."""

    def split(self, weight: Tensor) -> list[Tensor]:
        """The matrices in a weight, views where they are whole."""
        if not self.sizes:
            return [weight]
        unflat = weight.unflatten(self.dim, (self.repeats, sum(self.sizes)))
        return [part.flatten(self.dim, self.dim + 1) for part in unflat.split(self.sizes, dim=self.dim + 1)]

    def join(self, matrices: list[Tensor]) -> Tensor:
        """The inverse of `split`.

        >>> parts = Parts(dim=0, sizes=(1, 2), repeats=2)
        >>> weight = torch.arange(12).reshape(6, 2)
        >>> [part[:, 0].tolist() for part in parts.split(weight)]
        [[0, 6], [2, 4, 8, 10]]
        >>> torch.equal(parts.join(parts.split(weight)), weight)
        True
        """
        if not self.sizes:
            return matrices[0]
        unflat = [m.unflatten(self.dim, (self.repeats, -1)) for m in matrices]
        return torch.cat(unflat, dim=self.dim + 1).flatten(self.dim, self.dim + 1)


_QUERIES_KEYS_VALUES = "queries, keys and values"
_PER_HEAD = "queries, keys and values of each head"
_HALVES = "gate and value"
_JOINED: dict[str, dict[str, str]] = {
    "gpt2": {"c_attn": _QUERIES_KEYS_VALUES},
    "gpt_neox": {"query_key_value": _PER_HEAD},
    "modernbert": {"Wqkv": _QUERIES_KEYS_VALUES, "Wi": _HALVES},
    "modernbert-decoder": {"Wi": _HALVES},
    "phi3": {"qkv_proj": _QUERIES_KEYS_VALUES, "gate_up_proj": _HALVES},
    **{kind: {"gate_up_proj": _HALVES} for kind in ("glm", "glm4")},
}
"""What a weight holds, by `model_type` and the name of its module."""
_LIKELY_JOINED = re.compile(r"qkv|query_key_value|c_attn|gate_up|W_pack|in_proj|kv_b_proj|^Wi$")


def matrix_parts(model: nn.Module, names: Iterable[str]) -> dict[str, Parts]:
    """How the weights of these names are cut into matrices.

    Args:
        model: a stock model, whose config says what it is; of other modules every weight is one matrix.
        names: of weights with two dimensions.
    Raises:
        ModelError: a weight has more dimensions, or a name that speaks of several matrices joined in a way that is not
            known here.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    named = dict(model.named_parameters())
    found = {}
    for name in names:
        weight = named[name]
        if weight.ndim != 2:
            raise _no_muon(f"{name} has {weight.ndim} dimensions, and Muon updates matrices")
        module = name.split(".")[-2] if "." in name else ""
        joined = _JOINED.get(kind, {}).get(module)
        if joined is None:
            if config is not None and _LIKELY_JOINED.search(module):
                raise _no_muon(f"{name} seems to hold several matrices, and how is not known of {kind}")
            found[name] = Parts()
            continue
        dim = 1 if type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" else 0
        found[name] = _parts(joined, dim, weight.shape[dim], config)
    return found


def _no_muon(what: str) -> ModelError:
    return ModelError(what, where="optim.kind: muon", remedy="use optim.kind: adamw, or another model.kind")


def _parts(joined: str, dim: int, outputs: int, config: object) -> Parts:
    if joined == _HALVES:
        return Parts(dim, (outputs // 2, outputs // 2))
    heads = int(getattr(config, "num_attention_heads"))  # noqa: B009  # configs are not typed here
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if joined == _PER_HEAD:
        return Parts(dim, (outputs // (3 * heads),) * 3, repeats=heads)
    head_dim = outputs // (heads + 2 * groups)
    return Parts(dim, (heads * head_dim, groups * head_dim, groups * head_dim))

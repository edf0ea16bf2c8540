"""What all sections share: frozen, strict, nothing unknown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """Base of every recipe section: frozen, strict, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _integral(value: Any) -> Any:
    # `3e8` is a float in YAML and means the integer; 10.5 stays a float and is refused by strict mode.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _real(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Int = Annotated[int, BeforeValidator(_integral)]
"""An integer; `3e8` is accepted where it means one."""

Float = Annotated[float, BeforeValidator(_real)]
"""A float; an integer is accepted, a boolean is not."""

_Gelu = Literal["gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"]
_Relu = Literal["gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "prelu", "silu", "swish"]
_Other = Literal["hardswish", "laplace", "linear", "mish", "sigmoid", "sqrtsoftplus", "tanh", "xielu"]
Activation = _Gelu | _Relu | _Other
"""Transformers' names."""

AsTuple = BeforeValidator(_tuple)
"""Accepts a YAML list where the model holds a tuple."""

"""What `train.precision` asks of the machine, and the loss scale that float16 needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from lmssl.errors import TrainingError
from lmssl.model.layers import layer_stacks

GROWTH_STEPS = 2000
"""Steps in a row without an overflow after which the scale doubles; torch's GradScaler."""
FIRST_SCALE = 65536.0
MOST_SCALE = 2.0**24
LEAST_SCALE = 1.0
"""Below this a gradient that is not finite is no overflow."""
FP8_CAPABILITY = (8, 9)
"""Of the CUDA devices that multiply in 8 bits: Ada and later."""
BF16_CAPABILITY = (8, 0)
"""Of the CUDA devices that multiply bfloat16: Ampere and later."""
BF16_CPU_FLAGS = frozenset(("amx_bf16", "bf16"))
"""Linux's names of what multiplies bfloat16 faster than float32, on x86 and ARM. Elsewhere torch plays it, at a third
of float32's rate. `avx512_bf16` alone is at best as fast as float32 on Intel's processors, and counts on others'."""


class LossScale:
    """A factor of the loss that lifts small gradients into float16's range; on the device, and never waited for.

    A step whose gradients overflow is not made, and halves the scale. Its data is read and not read again, since which
    tokens a step reads depends on its number alone.
    Source: Micikevicius et al. 2018, "Mixed Precision Training", with the constants of torch's GradScaler; differs in
    deciding on the device, with the step's own flag of finite numbers.
    """

    def __init__(self, device: torch.device, saved: Mapping[str, float] | None = None) -> None:
        """Args: `saved`: what `state` gave."""
        state = {"scale": FIRST_SCALE, "good_steps": 0.0} | dict(saved or {})
        self.scale = torch.tensor(state["scale"], dtype=torch.float32, device=device)
        self._good = torch.tensor(state["good_steps"], dtype=torch.float32, device=device)

    def state(self) -> dict[str, float]:
        """Plain numbers for a checkpoint; reads the device."""
        return {"scale": float(self.scale.item()), "good_steps": float(self._good.item())}

    def overflowed(self, sums: Mapping[str, Tensor], grad_norm: Tensor) -> Tensor:
        """1.0 where gradients are not finite, the loss is, and the scale can still go down."""
        losses = torch.stack([value.float() for value in sums.values()])
        overflow = ~torch.isfinite(grad_norm) & torch.isfinite(losses).all() & (self.scale > LEAST_SCALE)
        return overflow.float()

    def follow(self, overflow: Tensor, made: Tensor) -> None:
        """Halve after an overflow, double after many steps that were made; a step skipped for its loss does neither."""
        good = torch.where(overflow > 0, torch.zeros_like(self._good), self._good + made)
        grows = good >= GROWTH_STEPS
        scale = torch.where(overflow > 0, self.scale / 2, torch.where(grows, self.scale * 2, self.scale))
        self.scale.copy_(scale.clamp(LEAST_SCALE, MOST_SCALE))
        self._good.copy_(torch.where(grows, torch.zeros_like(good), good))


def require_float32(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Prove that weights, and what the optimiser holds of them and of their gradients, are float32.

    Args:
        weights: by name, as far as this rank holds them.
    Raises:
        TrainingError: one is not.
    """
    masters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    states = ((key, value) for state in optimizer.state.values() for key, value in state.items())
    held = chain(weights.items(), (("a weight of the optimiser", master) for master in masters), states)
    for name, value in held:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            raise TrainingError(
                f"{name} is of {str(value.dtype).removeprefix('torch.')}; weights and optimiser are trained in float32",
                where="train.precision, and the launch file",
                remedy="leave precision to the recipe: train.precision says how products are computed",
            )


def bf16_is_faster(device_type: str, *, cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether a device multiplies bfloat16 by itself, and faster than float32.

    Args:
        device_type: cpu, cuda or another that torch names; of others it is assumed.
        cpu_info: Linux's description of the processors.
    """
    if device_type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= BF16_CAPABILITY
    if device_type != "cpu":
        return True
    if not cpu_info.exists():
        return False
    lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    flags = found.partition(":")[2].split()
    intel = any(line.startswith("vendor_id") and "GenuineIntel" in line for line in lines)
    # Intel: measured, a Xeon whose AMX is hidden from its guests. AMD: read in tables of instructions, not measured.
    return not BF16_CPU_FLAGS.isdisjoint(flags) or ("avx512_bf16" in flags and not intel)


def check_precision(precision: str, device: torch.device, backend: str) -> None:
    """See that the machine can compute as the recipe wants.

    Args:
        backend: name of the class of the backend.
    Raises:
        TrainingError: fp16 under DeepSpeed; fp8 without a device or package for it.
    """
    where = f"train.precision = {precision}"
    if precision == "fp16" and backend == "Zero":
        raise TrainingError(
            "DeepSpeed takes the norm of gradients before they can be unscaled",
            where=where,
            remedy="use bf16 or fp32, or launch DDP (recipes/launch/ddp.yaml) or FSDP2 (recipes/launch/fsdp2.yaml)",
        )
    if precision != "fp8":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        needed = ".".join(map(str, FP8_CAPABILITY))
        found = device.type
        if device.type == "cuda":
            found = (
                f"{torch.cuda.get_device_name(device)}, {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
            )
        raise TrainingError(
            f"products in 8 bits need a CUDA device of compute capability {needed}, and this is {found}",
            where=where,
            remedy="use bf16",
        )
    if importlib.util.find_spec("torchao") is None:
        raise TrainingError(
            "products in 8 bits come from torchao, which is not installed",
            where=where,
            remedy="pip install torchao, or use bf16",
        )
    if backend != "Replicated":
        raise TrainingError(
            "weights that are divided over ranks cannot be multiplied in 8 bits here",
            where=where,
            remedy="use bf16, or launch one process or DDP (recipes/launch/ddp.yaml)",
        )


def use_fp8(module: nn.Module) -> int:
    """Let the linear layers inside the stacks multiply in 8 bits, with scales of rows taken anew; returns how many.

    Weights, embeddings and heads stay as they are, and so do layers whose sides are no multiples of 16.
    Source: torchao's float8 training, rowwise recipe; scaling by rows as in FP8-LM (Peng et al. 2023) and DeepSeek-V3.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    count = 0

    def fits(part: nn.Module, _name: str) -> bool:
        nonlocal count
        good = isinstance(part, nn.Linear) and part.in_features % 16 == 0 and part.out_features % 16 == 0
        count += good
        return good

    for stack in layer_stacks(module):
        for layer in stack:
            convert_to_float8_training(
                layer, module_filter_fn=fits, config=Float8LinearConfig.from_recipe_name("rowwise")
            )
    return count

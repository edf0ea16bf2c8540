"""DeepSpeed ZeRO-1, -2 and -3, without and with offloading, driving our own optimiser.

The engine is made here and not by accelerate, whose `prepare` wants a data loader to read batch sizes from and replaces
the optimiser by DeepSpeed's own where it is offloaded. What the launch file says of ZeRO itself is taken as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lmssl.errors import CheckpointError, TrainingError
from lmssl.objective.module import LossModule
from lmssl.train.backend import Backend, Build, Part

_OURS = (
    ("gradient_accumulation_steps", 1, "batches and micro-batches are the recipe's"),
    ("gradient_clipping", 0.0, "set optim.max_grad_norm in the recipe"),
)


class Zero(Backend):
    """States (1), gradients too (2), weights too (3) are divided over ranks; weights and states are float32."""

    compile_modes = ("off",)  # stage 3 has hooks on every module, which break graphs; 1 and 2 are untried
    kernels = False  # stage 3 gathers the weights of a module when that is called

    def __init__(self, core: LossModule, accelerator: Accelerator, build: Build) -> None:
        import deepspeed  # an optional package, which takes seconds to import

        # Twenty lines a step, which tell nobody but DeepSpeed's authors anything.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*deprecated", category=FutureWarning)
        config = engine_config(accelerator.state.deepspeed_plugin.deepspeed_config)
        self.stage: int = config["zero_optimization"]["stage"]
        if self.stage < 3:
            core.to(accelerator.device)  # stage 3 moves it part by part
        self._named: dict[str, Any] = dict(core.model.named_parameters())
        engine, *_ = deepspeed.initialize(model=core, optimizer=build(), config=config)
        super().__init__(core, engine, accelerator, engine.optimizer.optimizer)
        self._engine: Any = engine
        self._zero: Any = engine.optimizer
        # accelerate has told transformers of stage 3, which would divide the model of a session that follows (one that
        # goes back to an earlier checkpoint) while it is built, and draw other weights.
        unset_hf_deepspeed_config()

    @property
    def name(self) -> str:
        """ZeRO and its stage."""
        return f"zero-{self.stage}"

    def forward(self, inputs: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """The loss; stage 3 gathers weights layer by layer."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        sums: dict[str, Tensor] = self._engine(inputs)
        return sums

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients; the engine averages them over ranks, and ours are parts of one global mean."""
        self._engine.backward(loss * self.accelerator.num_processes)

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm of what the ranks hold; the engine scales the gradients while it steps, by the same formula."""
        self._zero.clip_grad = max_norm or 0.0
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        else:
            self._zero._wait_for_offload_copies()
            norm = self._zero.scaled_global_norm()
        self._norm: Tensor = torch.as_tensor(norm).to(self.accelerator.device)
        return self._norm

    def update(self, finite: Tensor) -> Tensor:
        """Step, or let the engine throw the gradients away as it does when their norm is no number.

        It reads the norm on the host anyway, so the flag is read here.
        """
        norm = self._norm if bool(finite.item()) else torch.full_like(self._norm, -1.0)  # its mark of a bad norm
        # The norm is known: the engine need not take it again, and what it finds decides whether it steps.
        if self.stage == 3:
            self._zero._get_norm_groups = lambda: [norm]
        else:
            self._zero.scaled_global_norm = lambda: norm
        skipped = self._engine.skipped_steps
        try:
            self._engine.step()
        finally:
            del self._zero.__dict__["_get_norm_groups" if self.stage == 3 else "scaled_global_norm"]
        return torch.tensor(float(self._engine.skipped_steps == skipped), device=finite.device)

    def drop_gradients(self) -> None:
        """A step whose norm is no number: the engine alone knows what it holds."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=True)
        self._norm = torch.zeros((), device=self.accelerator.device)
        self.update(self._norm)

    def held(self) -> dict[str, Tensor]:
        """Stages 1 and 2: every weight. Stage 3: this rank's flat part of every weight, padded to equal parts."""
        if self.stage < 3:
            return dict(self._named)
        return {name: parameter.ds_tensor for name, parameter in self._named.items()}

    def weight_parts(self) -> dict[str, Part]:
        """The parameters; masters and parameters are equal, both being float32."""
        return {
            name: Part(
                _shape(parameter),
                partial(self._whole_weight, parameter),
                partial(self._fill_weight, parameter),
            )
            for name, parameter in self._named.items()
        }

    def state_parts(self) -> dict[str, Part]:
        """Moments by parameter, and the one step count of a group under the name of each of its parameters."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = list(self.optimizer.state.values())
        if not states:
            return {}
        self._link_states()
        found: dict[str, Part] = {}
        for name, parameter in self._trained().items():
            for key, value in states[0].items():
                if value.ndim == 0:
                    found[f"{key}/{name}"] = Part(value.shape, partial(_same, value), _refuse)
                else:
                    whole = partial(safe_get_full_optimizer_state, parameter, key)
                    fill = partial(self._fill_state, parameter, key)
                    found[f"{key}/{name}"] = Part(_shape(parameter), whole, fill)
        return found

    def average_parts(self) -> dict[str, Part]:
        """The averages, gathered where they are divided."""
        if self.average is None:
            return {}
        return {
            name: Part(
                _shape(self._named[name]),
                partial(self._whole_average, self._named[name], average),
                partial(self._fill_average, self._named[name], average),
            )
            for name, average in self.average.averages.items()
        }

    def load_states(self, states: Mapping[str, Tensor]) -> None:
        """Make the states that a first step would make, and fill them.

        Raises:
            CheckpointError: a parameter of the optimiser has none.
        """
        if not states:
            return
        firsts = {full.split("/", 1)[0]: full for full in states}
        kinds = {key: states[full].ndim == 0 for key, full in firsts.items()}
        missing = [f"{key}/{name}" for name in self._trained() for key in kinds if f"{key}/{name}" not in states]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more tensors of the optimiser",
                where="optim.safetensors",
                remedy="DeepSpeed continues AdamW's states only, and those of all weights; use DDP or FSDP2",
            )
        for flat in self._flat_masters():
            state = self.optimizer.state[flat]
            for key, is_scalar in kinds.items():
                if is_scalar:
                    state[key] = states[firsts[key]].to(flat.device, copy=True)
                elif key not in state:
                    state[key] = torch.zeros_like(flat)
        self._link_states()
        for name, parameter in self._trained().items():
            for key, is_scalar in kinds.items():
                if not is_scalar:
                    self._fill_state(parameter, key, states[f"{key}/{name}"])

    def close(self) -> None:
        """End the engine, all ranks together: without this, ranks of stage 3 sometimes aborted at exit."""
        self.accelerator.wait_for_everyone()
        self._engine.destroy()

    def _trained(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self._named.items() if parameter.requires_grad}

    def _flat_masters(self) -> list[Tensor]:
        masters: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        return masters

    def _link_states(self) -> None:
        """Have the engine find all groups' states; by itself it looks once, after the first group's first step."""
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _whole_weight(self, parameter: Any) -> Tensor:
        if self.stage < 3:
            return parameter.detach()  # type: ignore[no-any-return]
        return self._gathered(parameter, parameter.ds_tensor)

    def _fill_weight(self, parameter: Any, values: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with torch.no_grad():
            if self.stage < 3:
                parameter.copy_(values)
                safe_set_full_fp32_param(parameter, values)
                return
            with GatheredParameters([parameter], modifier_rank=0):
                if self.accelerator.is_main_process:
                    parameter.copy_(values)
            safe_set_local_fp32_param(parameter, self._my_part(parameter, values))

    def _fill_state(self, parameter: Any, key: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, values, key)
        else:  # the function for whole tensors reads beyond the end of those that do not divide evenly
            safe_set_local_optimizer_state(parameter, self._my_part(parameter, values), key)

    def _whole_average(self, parameter: Any, average: Tensor) -> Tensor:
        return average if self.stage < 3 else self._gathered(parameter, average)

    def _fill_average(self, parameter: Any, average: Tensor, values: Tensor) -> None:
        average.copy_(values if self.stage < 3 else self._my_part(parameter, values))

    def _gathered(self, parameter: Any, part: Tensor) -> Tensor:
        flat = self.gather(part.detach().to(self.accelerator.device))
        return flat[: parameter.ds_numel].view(parameter.ds_shape)

    def _my_part(self, parameter: Any, values: Tensor) -> Tensor:
        """This rank's flat part of a whole tensor; the last ones are padded with zeros."""
        size, rank = parameter.ds_tensor.numel(), self.accelerator.process_index
        part = values.flatten()[rank * size : (rank + 1) * size]
        return F.pad(part, (0, size - part.numel()))


def engine_config(launch: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is told: the launch file's section of ZeRO, and nothing else of it.

    Args:
        launch: DeepSpeed's configuration as accelerate makes it from a launch file.
    Raises:
        TrainingError: it says what recipes say.

    >>> engine_config({"zero_optimization": {"stage": 2}, "fp16": {"enabled": False}})["zero_optimization"]
    {'stage': 2, 'use_multi_rank_bucket_allreduce': False}
    """
    problems = [
        f"{key}: {launch[key]}; {why}" for key, ours, why in _OURS if launch.get(key, ours) not in (ours, "auto")
    ]
    problems += [
        f"{key}; {why}"
        for key, why in (("optimizer", "optimisers are the recipe's"), ("scheduler", "schedules are the recipe's"))
        if key in launch
    ]
    problems += [
        f"{kind}: enabled; set train.precision in the recipe"
        for kind in ("fp16", "bf16")
        if launch.get(kind, {}).get("enabled") is True
    ]
    zero = dict(launch.get("zero_optimization", {}))
    if zero.get("stage", 0) not in (1, 2, 3):
        problems.append(f"zero_stage: {zero.get('stage', 0)}; use 1, 2 or 3, or DDP instead of 0")
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") in ("none", None):
            zero.pop(part, None)
        elif zero[part]["device"] == "nvme":
            problems.append(f"{part}_device: nvme; use cpu")
    if zero.get("stage") in (1, 2):  # else every rank is sent the whole sums, and throws away what it does not own
        zero.setdefault("use_multi_rank_bucket_allreduce", False)
    if problems:
        raise TrainingError(
            "the launch file's DeepSpeed configuration says what this trainer does itself:"
            + "".join(f"\n    {problem}" for problem in problems),
            where="accelerate config",
            remedy="take these out; recipes/launch/zero2.yaml shows a whole file",
        )
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPU, too, and gives the same numbers
    }


def _shape(parameter: Any) -> torch.Size:
    """Of the whole parameter, which stage 3 replaces by an empty one."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _same(value: Tensor) -> Tensor:
    return value


def _refuse(values: Tensor) -> None:
    raise AssertionError("step counts are set with the states they belong to")

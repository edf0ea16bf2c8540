"""How weights are spread over processes, behind one interface: what the step, a save and a resume ask for.

A backend wraps the one module that is trained, owns its optimiser and the averages of its weights, and gives and takes
whole named tensors, so that a checkpoint does not say which backend or how many processes wrote it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lmssl import checkpoint
from lmssl.errors import CheckpointError
from lmssl.objective.module import LossModule
from lmssl.optim.ema import WeightAverage
from lmssl.train.precision import LossScale

Build = Callable[[], torch.optim.Optimizer]
"""Builds the optimiser over the parameters as they are when it is called."""


@dataclass(frozen=True)
class Part:
    """A named tensor of a run, however it is spread."""

    shape: torch.Size
    """Of all of it."""
    whole: Callable[[], Tensor]
    """All of it, on any device; every rank must call, for ranks may have to exchange what they hold."""
    fill: Callable[[Tensor], None]
    """Takes its values from a tensor of full shape; each rank keeps what it holds."""
    owner: int | None = None
    """The rank that has to write it; None: all ranks list this part, and any may."""


class Backend(ABC):
    """One way to spread weights, gradients and optimiser states over processes."""

    compile_modes: ClassVar[tuple[str, ...]] = ("off", "layers", "model")
    """What it can compile."""
    kernels: ClassVar[bool] = True
    """Whether a layer may read the weights of its parts without calling them, as our own kernels do."""

    def __init__(self, core: LossModule, module: nn.Module, accelerator: Accelerator, optimizer: Any) -> None:
        self.core = core
        """The module itself: names and sizes."""
        self.module = module
        """The wrapped module: what is called in training."""
        self.accelerator = accelerator
        self.optimizer: torch.optim.Optimizer = optimizer
        """`param_groups` hold `peak_lr`; the step sets their `lr`."""
        self.average: WeightAverage | None = None
        self.loss_scale: LossScale | None = None
        """Where products are of float16; else None."""

    @property
    def evaluated(self) -> nn.Module:
        """What is called in evaluation, by all ranks equally often."""
        return self.module

    @property
    @abstractmethod
    def name(self) -> str:
        """What a person calls it."""

    @abstractmethod
    def forward(self, inputs: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """The loss of one micro-batch; `last`: its backward is the one that exchanges gradients."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of this rank's part of a loss; parts of all ranks and micro-batches add up."""

    def scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass begins from: the loss, lifted where float16 wants it."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def unscale(self) -> None:
        """Undo that for the gradients of a whole step."""
        if self.loss_scale is None:
            return
        gradients = [parameter.grad for parameter in _parameters(self.optimizer) if parameter.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        torch._foreach_mul_(local, 1.0 / self.loss_scale.scale)

    @abstractmethod
    def clip(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before."""

    @abstractmethod
    def update(self, finite: Tensor) -> Tensor:
        """Move the weights unless `finite` is 0.0, and drop the gradients; returns 1.0 where they were moved."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget what was accumulated, and move nothing."""

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """What this rank holds of every weight, by name; the averages are kept beside it."""

    @abstractmethod
    def weight_parts(self) -> dict[str, Part]:
        """Every weight once, by the stock model's names."""

    @abstractmethod
    def state_parts(self) -> dict[str, Part]:
        """Optimiser tensors that exist, as `<state>/<parameter>`."""

    @abstractmethod
    def average_parts(self) -> dict[str, Part]:
        """The average of every weight; empty where there is none."""

    @abstractmethod
    def load_states(self, states: Mapping[str, Tensor]) -> None:
        """Put `<state>/<parameter>` tensors of full shape in place of the optimiser's."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""
        reduced: Tensor = self.accelerator.reduce(tensor, "sum")
        return reduced

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, rank by rank."""
        gathered: Tensor = self.accelerator.gather(tensor)
        return gathered

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(part.shape.numel() for part in self.weight_parts().values())

    def keep_average(self, decay: float) -> None:
        """Begin to average the weights as they are now."""
        self.average = WeightAverage(self.held(), decay)

    def owned_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the tensors that this rank writes: float32, whole, on CPU, by group and name.

        Every rank must call; one tensor is gathered at a time, so that no device holds the whole model.
        """
        groups = {"model": self.weight_parts(), "optim": self.state_parts()}
        if self.average is not None:
            groups["ema"] = self.average_parts()
        return {group: self._owned(parts) for group, parts in groups.items()}

    def _owned(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        shared = {name: part.shape.numel() for name, part in parts.items() if part.owner is None}
        owners = checkpoint.owners(shared, self.accelerator.num_processes)
        found: dict[str, Tensor] = {}
        for name, part in parts.items():  # in one order on all ranks that exchange
            whole = part.whole()
            if owners.get(name, part.owner) == self.accelerator.process_index:
                found[name] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
        return found

    def load(
        self,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        averages: Mapping[str, Tensor] | None,
        *,
        where: str,
    ) -> None:
        """Continue from whole tensors, whichever backend and number of processes wrote them.

        Args:
            averages: of the weights; ignored where none are kept.
        Raises:
            CheckpointError: names or shapes differ from the model's; nothing is changed then.
        """
        parts = self.weight_parts()
        check_fit({name: part.shape for name, part in parts.items()}, weights, where=where)
        for name, part in parts.items():
            part.fill(weights[name])
        self.load_states(states)
        if self.average is not None and averages is not None:
            for name, part in self.average_parts().items():
                part.fill(averages[name])

    def close(self) -> None:  # noqa: B027 - most backends leave nothing behind
        """Let go of what the process would not give back by itself at its end."""


def check_fit(shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: they differ; names the first that does.
    """
    differing = sorted(set(shapes) ^ set(tensors))
    differing += [name for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    if differing:
        raise CheckpointError(
            f"weights do not fit the model: {differing[0]!r} and {len(differing) - 1} more differ in name or shape",
            where=where,
            remedy="use the recipe this checkpoint was made with",
        )


def keeper(optimizer: Any, parameter: Tensor) -> int | None:
    """Which of the ranks with copies of a parameter alone keeps its optimiser state; None: all do."""
    find = getattr(optimizer, "keeper", None)  # Muon's, which divides its work
    rank: int | None = None if find is None else find(parameter)
    return rank


def states_of(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, str, Tensor]]:
    """Parameters with the states that this rank keeps: name, parameter, kind of state, state."""
    keeps = getattr(optimizer, "keeps", lambda _: True)
    for name, parameter in named.items():
        if parameter in optimizer.state and keeps(parameter):
            for key, value in optimizer.state[parameter].items():
                yield name, parameter, key, value


def put_states(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    place: Callable[[Tensor, Any], Tensor],
) -> None:
    """Replace the states that this rank keeps by those of a checkpoint.

    Args:
        place: a copy of a tensor on the right device, of this rank's part where the parameter is divided.
    """
    keeps = getattr(optimizer, "keeps", lambda _: True)
    found: dict[str, dict[str, Tensor]] = {}
    for full in states:
        key, name = full.split("/", 1)
        if keeps(named[name]):
            found.setdefault(name, {})[key] = place(states[full], named[name])
    for name, state in found.items():
        optimizer.state[named[name]] = state


class Replicated(Backend):
    """Every process holds every weight: one process, or DDP, whose gradients are averaged."""

    def __init__(self, core: LossModule, accelerator: Accelerator, build: Build) -> None:
        core.to(accelerator.device)
        optimizer = build()
        super().__init__(core, accelerator.prepare_model(core), accelerator, optimizer)

    @property
    def name(self) -> str:
        """One process, or DDP."""
        return "ddp" if self.accelerator.num_processes > 1 else "single"

    @property
    def evaluated(self) -> nn.Module:
        """The module itself: DDP would exchange buffers that are equal."""
        return self.core

    def forward(self, inputs: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """The loss; DDP prepares the exchange of gradients here."""
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = last  # what its no_sync() sets
        sums: dict[str, Tensor] = self.module(inputs)
        return sums

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients; DDP averages them over ranks, and ours are parts of one global mean."""
        (loss * self.accelerator.num_processes).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """The same on every rank, for the gradients are.

        Torch multiplies by 1.0 where they are short enough, a pass over all of them; where asking costs no wait for a
        device it is left out, bit for bit the same.
        """
        parameters = _parameters(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm is None or (norm.device.type == "cpu" and max_norm / (norm + 1e-6) >= 1):  # as torch computes it
            return norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def update(self, finite: Tensor) -> Tensor:
        """The fused kernel leaves weights, moments and step count alone when `found_inf` is set."""
        self.optimizer.found_inf = 1.0 - finite  # type: ignore[attr-defined]  # GradScaler sets it so
        self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def close(self) -> None:
        """Take DDP's reducer apart while the process group lives.

        torch frees it without letting go of the interpreter's lock; where that frees the last reference to the process
        group as well, the group's destructor waits for a thread that waits for the lock. Seen with gloo in one of ten
        processes that destroyed the group first.
        """
        for name in ("logger", "reducer"):
            vars(self.module).pop(name, None)
        self.module = self.core

    def drop_gradients(self) -> None:
        """Forget them."""
        self.optimizer.zero_grad()

    def held(self) -> dict[str, Tensor]:
        """All of every weight."""
        return dict(self.core.model.named_parameters())

    def weight_parts(self) -> dict[str, Part]:
        """The parameters."""
        return {name: _whole(parameter) for name, parameter in self.core.model.named_parameters()}

    def state_parts(self) -> dict[str, Part]:
        """Moments and step counts."""
        return {
            f"{key}/{name}": _whole(value, keeper(self.optimizer, parameter))
            for name, parameter, key, value in states_of(self.optimizer, self.held())
        }

    def average_parts(self) -> dict[str, Part]:
        """The averages."""
        return {} if self.average is None else {name: _whole(a) for name, a in self.average.averages.items()}

    def load_states(self, states: Mapping[str, Tensor]) -> None:
        """Copies on the parameters' device; a fused kernel wants the step count there, too."""
        put_states(self.optimizer, self.held(), states, lambda values, like: values.to(like.device, copy=True))


def _whole(tensor: Tensor, owner: int | None = None) -> Part:
    def fill(values: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(values)

    return Part(tensor.shape, lambda: tensor, fill, owner)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

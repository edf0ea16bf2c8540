"""FSDP2: weights, gradients and states divided over all ranks, or within groups of ranks that are replicas (HSDP).

torch's `fully_shard` is called here and not accelerate's preparation, which looks for embeddings and classes of layers
on the module it is given and finds none on ours, and replaces the parameters of an optimiser that it needs to be given
at the same time. The launch file still says how: sizes of the mesh, and whether layers give up weights after forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lmssl.errors import TrainingError
from lmssl.model.layers import layer_stacks
from lmssl.objective.module import LossModule
from lmssl.train.backend import Backend, Build, Part, keeper, put_states, states_of


class FullySharded(Backend):
    """Float32 weights that are gathered layer by layer; gradients are added up and exchanged in float32."""

    compile_modes = ("off", "layers")  # the hooks that gather weights stand between layers

    def __init__(self, core: LossModule, accelerator: Accelerator, build: Build) -> None:
        plugin = accelerator.state.fsdp_plugin
        self._mesh = _mesh(accelerator)
        for stack in layer_stacks(core):
            for layer in stack:
                fully_shard(layer, mesh=self._mesh, reshard_after_forward=plugin.reshard_after_forward)
        # What is in no layer (embedding, norm, head) belongs to the root, which has them until the backward is over:
        # the head's gradient is taken in the forward, and tied weights may be in one group only.
        root: Any = fully_shard(core, mesh=self._mesh)
        self._root: FSDPModule = root
        core.to(accelerator.device)  # buffers of the root; the rest is there
        # Not asked for again: parts that are gathered show other parameters, and the root is gathered after evaluation.
        self._named: dict[str, Any] = dict(core.model.named_parameters())
        super().__init__(core, root, accelerator, build())

    @property
    def name(self) -> str:
        """FSDP2, and over how many replicas."""
        return "fsdp2" if self._mesh.ndim == 1 else f"fsdp2 x {self._mesh.size(0)} replicas"

    def forward(self, inputs: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """The loss; before the last micro-batch gradients stay where they are, whole."""
        self._root.set_requires_gradient_sync(last)
        sums: dict[str, Tensor] = self.module(inputs)
        return sums

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients; with the last they are averaged over ranks, and ours are parts of one global mean."""
        (loss * self.accelerator.num_processes).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm over all ranks' parts."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, finite: Tensor) -> Tensor:
        """Each rank updates its part; the fused kernel leaves all of it alone when `found_inf` is set."""
        self.optimizer.found_inf = 1.0 - finite  # type: ignore[attr-defined]  # GradScaler sets it so
        self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def drop_gradients(self) -> None:
        """Forget them, those not yet exchanged too."""
        self.optimizer.zero_grad()
        for module in self._wrapped():
            _drop_unsharded(module)

    def held(self) -> dict[str, Tensor]:
        """This rank's rows of every weight."""
        return {name: _local(parameter) for name, parameter in self._named.items()}

    def weight_parts(self) -> dict[str, Part]:
        """The parameters."""
        return {name: _part(parameter) for name, parameter in self._named.items()}

    def state_parts(self) -> dict[str, Part]:
        """States, divided as their parameters are; step counts are not."""
        found: dict[str, Part] = {}
        shards = self._mesh.size(-1)
        for name, parameter, key, value in states_of(self.optimizer, self._named):
            replica = keeper(self.optimizer, parameter)
            # Kept by one row of the mesh only, whose ranks take turns in writing.
            owner = None if replica is None else replica * shards + len(found) % shards
            found[f"{key}/{name}"] = _part(value, owner)
        return found

    def average_parts(self) -> dict[str, Part]:
        """The averages, divided as the weights are."""
        if self.average is None:
            return {}
        return {
            name: _part(
                DTensor.from_local(
                    average,
                    self._named[name].device_mesh,
                    self._named[name].placements,
                    shape=self._named[name].shape,
                    stride=self._named[name].stride(),
                )
            )
            for name, average in self.average.averages.items()
        }

    def load(
        self,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        averages: Mapping[str, Tensor] | None,
        *,
        where: str,
    ) -> None:
        """As every backend; what evaluation left gathered is given up, or the next forward would read old weights."""
        for module in self._wrapped():
            module.reshard()
        super().load(weights, states, averages, where=where)

    def load_states(self, states: Mapping[str, Tensor]) -> None:
        """Each rank keeps its rows of every state."""
        device = self.accelerator.device

        def place(values: Tensor, like: DTensor) -> Tensor:
            values = values.to(device, copy=True)
            return values if values.ndim == 0 else _divided(values, like)

        put_states(self.optimizer, self._named, states, place)

    def _wrapped(self) -> list[FSDPModule]:
        return [module for module in self.core.modules() if isinstance(module, FSDPModule)]


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    """Ranks as a row, or as rows of replicas.

    Raises:
        TrainingError: the launch file wants what is not driven, or sizes that are not those of the launch.
    """
    plugin, sizes = accelerator.state.fsdp_plugin, accelerator.parallelism_config
    replicas, shards = (
        (1, accelerator.num_processes) if sizes is None else (sizes.dp_replicate_size, sizes.dp_shard_size)
    )
    problem = None
    if plugin.fsdp_version != 2:
        problem = "fsdp_version: 1; write 2"
    elif isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problem = "fsdp_offload_params: true; offloading is DeepSpeed's (recipes/launch/zero3-offload.yaml)"
    elif plugin.activation_checkpointing:
        problem = "fsdp_activation_checkpointing: true; recipes decide it"
    elif sizes is not None and sizes.non_data_parallel_size > 1:
        problem = "tensor, context or sequence parallelism; only replicas and shards are driven"
    elif replicas * shards != accelerator.num_processes:
        problem = f"{replicas} replicas x {shards} shards, but {accelerator.num_processes} processes were started"
    if problem is not None:
        raise TrainingError(
            f"the launch file says {problem}",
            where="accelerate config",
            remedy="compare it with recipes/launch/fsdp2.yaml and fsdp2-hybrid.yaml",
        )
    kind = accelerator.device.type
    if replicas == 1:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _divided(values: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor that every rank has, without communication."""
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def _part(tensor: Tensor, owner: int | None = None) -> Part:
    if not isinstance(tensor, DTensor):
        return Part(tensor.shape, lambda: tensor, partial(_fill, tensor), owner)
    return Part(tensor.shape, tensor.full_tensor, partial(_fill_divided, tensor), owner)


def _fill(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)


def _fill_divided(tensor: DTensor, values: Tensor) -> None:
    with torch.no_grad():
        _local(tensor).copy_(_local(_divided(values.to(tensor.device), tensor)))


def _drop_unsharded(module: Any) -> None:
    """Gradients that were added up without exchange live on FSDP2's own parameters until it exchanges them."""
    group = module._get_fsdp_state()._fsdp_param_group
    for parameter in group.fsdp_params if group is not None else ():
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None

"""What launch files may say, which backend drives what, and which parts of a model are compiled layer by layer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import ElectraConfig

from kinds import tiny
from lmssl.errors import TrainingError
from lmssl.model.build import build_model
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe
from lmssl.train import launch
from lmssl.train.backend import Replicated
from lmssl.train.fully_sharded import FullySharded
from lmssl.train.launch import choose_compile, compile_module, open_accelerator
from lmssl.train.opening import backend_class
from lmssl.train.zero import Zero, engine_config
from runs import small_recipe, write_recipe

MUON = {"kind": "muon", "lr": 0.02, "adamw_lr": 0.003}


def recipe_of(tmp_path: Path, **changes: Any) -> Recipe:
    changed = small_recipe(tmp_path, tmp_path / "run", tmp_path / "cache", **changes)
    return load_recipe(write_recipe(tmp_path / "recipe.yaml", changed)).recipe


def launched(kind: str, **more: Any) -> Any:
    """An Accelerator as a launch would make it, as far as a choice of backend looks at it."""
    return SimpleNamespace(distributed_type=DistributedType(kind), device=torch.device("cpu"), **more)


def sharded(processes: int, *, sizes: tuple[int, int] | None = None, others: int = 1, **changes: Any) -> Any:
    plugin = {"fsdp_version": 2, "cpu_offload": False, "activation_checkpointing": False, "reshard_after_forward": True}
    named = None
    if sizes is not None:
        replicas, shards = sizes
        named = SimpleNamespace(dp_replicate_size=replicas, dp_shard_size=shards, non_data_parallel_size=others)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**(plugin | changes)))
    return launched("FSDP", state=state, parallelism_config=named, num_processes=processes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("single", "NO"),
        ("ddp", "MULTI_GPU"),
        *((f"fsdp2{end}", "FSDP") for end in ("", "-hybrid")),
        *((f"zero{name}", "DEEPSPEED") for name in ("1", "2", "3", "2-offload", "3-offload")),
    ],
)
def test_launch_files_are_accelerates_and_say_only_where(name: str, kind: str, root: Path) -> None:
    """That each starts a run is shown in numerics/test_parity.py."""
    path = root / f"recipes/launch/{name}.yaml"
    config: Any = load_config_from_file(str(path))
    assert config.distributed_type.value == kind
    assert config.mixed_precision == "no"
    assert name in path.read_text(encoding="utf-8").split("compute_environment")[0], "its comment says how it is used"
    if kind == "DEEPSPEED":
        fields = config.deepspeed_config
        assert fields["zero_stage"] == int(name[4])
        assert (fields["offload_optimizer_device"] == "cpu") == name.endswith("offload")
        assert (fields["offload_param_device"] == "cpu") == (name == "zero3-offload")
    if name == "fsdp2-hybrid":
        sizes = config.parallelism_config
        replicas, shards = (sizes[f"parallelism_config_dp_{part}_size"] for part in ("replicate", "shard"))
        assert replicas * shards == config.num_processes


def test_every_launch_file_is_tested(root: Path) -> None:
    names = {path.stem for path in (root / "recipes/launch").glob("*.yaml")}
    stages = {f"zero{name}" for name in ("1", "2", "3", "2-offload", "3-offload")}
    assert names == {"single", "ddp", "fsdp2", "fsdp2-hybrid", *stages}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("MIXED_PRECISION", "fp16", "mixed_precision: fp16, the recipe train.precision: fp32"),
        ("DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend: inductor, the recipe train.compile: off"),
        (
            "GRADIENT_ACCUMULATION_STEPS",
            "4",
            "gradient_accumulation_steps: 4, the recipe train.micro_batch_sequences: 8",
        ),
    ],
)
def test_a_launch_file_that_contradicts_the_recipe_is_refused(
    variable: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(TrainingError, match="the launch file says") as caught:
        open_accelerator(recipe_of(tmp_path, **{"train.precision": "fp32"}), tmp_path)
    assert said in str(caught.value)


def test_deepspeed_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(TrainingError, match=r"pip install 'lmssl\[deepspeed\]'"):
        open_accelerator(recipe_of(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("NO", Replicated), ("MULTI_GPU", Replicated), ("FSDP", FullySharded), ("DEEPSPEED", Zero)],
)
def test_the_launch_chooses_the_backend(kind: str, expected: type, tmp_path: Path) -> None:
    assert backend_class(launched(kind), recipe_of(tmp_path)) is expected


def test_deepspeed_refuses_muon_and_names_who_can(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, optim=MUON)
    with pytest.raises(TrainingError, match=r"(?s)DeepSpeed cannot drive muon.*DDP.*FSDP2"):
        backend_class(launched("DEEPSPEED"), recipe)
    assert backend_class(launched("FSDP"), recipe) is FullySharded


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (sharded(2, fsdp_version=1), "fsdp_version: 1; write 2"),
        (sharded(2, cpu_offload=CPUOffloadPolicy()), "zero3-offload.yaml"),
        (sharded(2, activation_checkpointing=True), "recipes decide it"),
        (sharded(4, sizes=(1, 2), others=2), "only replicas and shards"),
        (sharded(6, sizes=(2, 2)), "2 replicas x 2 shards, but 6 processes"),
    ],
)
def test_what_fsdp2_does_not_drive_is_refused(launch: Any, said: str) -> None:
    with pytest.raises(TrainingError) as caught:
        FullySharded(nn.Module(), launch, lambda: None)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 2"),
        ({"gradient_clipping": 1.0}, "optim.max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, "optimisers are the recipe's"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedules are the recipe's"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"zero_optimization": {"stage": 0}}, "zero_stage: 0"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param_device: nvme"),
    ],
)
def test_what_deepspeed_should_not_decide_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError) as caught:
        engine_config({"zero_optimization": {"stage": 2}, **config})
    assert said in str(caught.value)


def test_deepspeed_is_told_what_the_launch_file_says_of_zero() -> None:
    given = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
    }
    config = engine_config({"zero_optimization": given, "train_batch_size": "auto", "bf16": {"enabled": "auto"}})
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
    assert "bf16" not in config


def test_a_backend_compiles_what_it_can(tmp_path: Path) -> None:
    sizes = {"num_parameters": 10**9, "tokens_left": 10**9}
    chosen = recipe_of(tmp_path, **{"train.compile": "model"})
    with pytest.raises(TrainingError, match=r"train.compile=model"):
        choose_compile(chosen, torch.device("cuda"), **sizes, modes=FullySharded.compile_modes)
    auto = recipe_of(tmp_path, **{"train.compile": "auto"})
    found = [
        choose_compile(auto, torch.device("cuda"), **sizes, modes=kind.compile_modes) for kind in (FullySharded, Zero)
    ]
    assert found == ["layers", "off"]


@pytest.mark.parametrize("threads", [1, 4])
def test_when_kernels_are_used_and_what_is_compiled_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(launch.native, "processor_can", lambda dtype: dtype != torch.float16)
    monkeypatch.setattr(launch, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    auto, on, off = (
        recipe_of(tmp_path, **{"train.compile": "auto", "train.kernels": kernels}) for kernels in ("auto", "on", "off")
    )
    for recipe, device, dtype, expected in (
        (auto, cpu, torch.bfloat16, True),
        (on, cpu, torch.bfloat16, True),
        (off, cpu, torch.bfloat16, False),
        (auto, cpu, torch.float32, True),
        (on, cpu, torch.float16, False),
        (on, cuda, torch.bfloat16, False),
    ):
        assert launch.may_use_kernels(recipe, device, dtype) == expected
    for dtype, flops in launch.KERNELS_PAY_FLOPS_PER_THREAD.items():
        enough = int(threads * flops / 6 / auto.batches.total_tokens)
        assert [launch.kernels_pay(auto, enough + more, dtype) for more in (-2, 2)] == [False, True]
        assert launch.kernels_pay(on, 1, dtype)
    beside = launch.COMPILE_PAYS_BESIDE_KERNELS.items()
    for kernels, flops in ((None, launch.COMPILE_PAYS_FLOPS_PER_THREAD), *beside):
        enough = int(threads * flops / 6 / 1000)
        found = [
            choose_compile(auto, cpu, num_parameters=enough + more, tokens_left=1000, kernels=kernels)
            for more in (-2, 2)
        ]
        assert found == ["off", "model"]
    monkeypatch.setattr(launch.native, "processor_can", lambda dtype: False)
    assert not launch.may_use_kernels(on, cpu, torch.bfloat16)


def test_deepspeed_gathers_weights_of_what_is_called() -> None:
    assert (Replicated.kernels, FullySharded.kernels, Zero.kernels) == (True, True, False)


def compiled_parts(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what `compile_module` hands to the compiler."""
    names, found = {part: name for name, part in model.named_modules()}, []
    monkeypatch.setattr(nn.Module, "compile", lambda part, **_: found.append(names[part]))
    compile_module(model, "layers")
    return found


@pytest.mark.parametrize(
    ("kind", "objective", "stacks"),
    [
        ("llama", "causal", ["model.layers"]),
        ("bert", "masked", ["bert.encoder.layer"]),
        ("t5", "span", ["encoder.block", "decoder.block"]),
    ],
)
def test_every_layer_is_compiled(kind: str, objective: str, stacks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled_parts(tiny(kind, objective=objective), monkeypatch)
    assert found == [f"{stack}.{number}" for stack in stacks for number in range(2)]


def test_generator_and_discriminator_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = ElectraConfig(vocab_size=50, embedding_size=16, **sizes)
    model = build_model(config, objective="replaced", seed=1, generator_ratio=0.5, device="meta")
    found = compiled_parts(model, monkeypatch)
    stacks = ("discriminator.electra.encoder.layer", "generator.electra.encoder.layer")
    assert found == [f"{stack}.{number}" for stack in stacks for number in range(3)]

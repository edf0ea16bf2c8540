"""Types of products: float16 with its loss scale, and what a machine must have for float8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.errors import TrainingError
from lmssl.recipe.load import load_recipe
from lmssl.train import launch, precision
from lmssl.train.branch import branch_recipe
from lmssl.train.launch import with_precision
from lmssl.train.precision import LossScale, bf16_is_faster, check_precision, require_float32
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

CPU = torch.device("cpu")
ONE, NONE = torch.tensor(1.0), torch.tensor(0.0)


def run(folder: Path, text: Path, label: str, *, steps: int, **change: Any) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    change = {"model": {"kind": "llama", **sizes}, "train.precision": "fp16", **change}
    content = small_recipe(text, folder / label, folder / "cache", steps=steps, **change)
    return train(load_recipe(write_recipe(folder / f"{label}.yaml", content)))


def losses(path: Path) -> list[float]:
    rows = (row for row in metrics(path) if row["kind"] == "train")
    return [row["loss"] for row in rows if row.get("loss") is not None]


def test_float16_learns_as_float32_does(tmp_path: Path, text_folder: Path) -> None:
    half = run(tmp_path, text_folder, "half", steps=30)
    whole = run(tmp_path, text_folder, "whole", steps=30, **{"train.precision": "fp32"})
    assert losses(half) == pytest.approx(losses(whole), rel=2e-3)
    assert losses(half)[-1] < losses(half)[0] - 0.5
    rows = [row for row in metrics(half) if row["kind"] == "train"]
    assert rows[-1]["overflow_steps"] == rows[-1]["skipped_steps"] == 0 and rows[-1]["loss_scale"] == 65536


def test_it_recovers_from_overflows_and_counts_them_apart(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale far too large: more overflows in a row than a run may skip steps, and none of them is a skipped step."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**40)
    monkeypatch.setattr(precision, "MOST_SCALE", 2.0**40)
    path = run(tmp_path, text_folder, "run", steps=40, **{"train.max_skipped_steps": 2})
    rows = metrics(path)
    overflows = [row["step"] for row in rows if row.get("action") == "overflow"]
    assert len(overflows) > 10 and overflows[:10] == list(range(1, 11))
    last = next(row for row in reversed(rows) if row["kind"] == "train")
    assert (last["overflow_steps"], last["skipped_steps"]) == (len(overflows), 0)
    assert last["loss_scale"] == 2.0 ** (40 - len(overflows))
    found = losses(path)
    assert len(found) == 40 - len(overflows) and found[-1] < found[0] - 0.5
    assert "step 1 not made: its gradients overflow in float16; the loss scale is halved" in capsys.readouterr().out
    state = json.loads(checkpoint.find_step(path, None).text("state.json"))
    assert (state["overflow_steps"], state["skipped_steps"]) == (len(overflows), 0)


def test_the_scale_goes_on_where_a_checkpoint_left_it(tmp_path: Path, text_folder: Path) -> None:
    constant = {"schedule": {"kind": "constant", "warmup_tokens": 1024}}
    path = run(tmp_path, text_folder, "run", steps=3, **constant)
    assert json.loads(checkpoint.find_step(path, None).text("state.json"))["loss_scale"] == {
        "scale": 65536.0,
        "good_steps": 3.0,
    }
    run(tmp_path, text_folder, "run", steps=6, **constant)
    whole = run(tmp_path, text_folder, "whole", steps=6, **constant)
    a, b = (checkpoint.find_step(folder, None) for folder in (path, whole))
    assert json.loads(a.text("state.json")) == json.loads(b.text("state.json"))
    assert all(tensor.equal(b.tensors("model")[name]) for name, tensor in a.tensors("model").items())


def test_the_scale_halves_doubles_and_stays() -> None:
    scale = LossScale(CPU)
    scale.follow(ONE, NONE)
    assert scale.state() == {"scale": 32768.0, "good_steps": 0.0}
    scale.follow(NONE, ONE)
    scale.follow(NONE, NONE)  # skipped for its loss
    assert scale.state() == {"scale": 32768.0, "good_steps": 1.0}
    scale = LossScale(CPU, {"scale": 8.0, "good_steps": precision.GROWTH_STEPS - 1})
    scale.follow(NONE, ONE)
    assert scale.state() == {"scale": 16.0, "good_steps": 0.0}
    scale = LossScale(CPU, {"scale": 1.0, "good_steps": 5.0})
    scale.follow(ONE, NONE)
    assert scale.state()["scale"] == 1.0


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "overflow"),
    [
        (2.0, torch.inf, 8.0, 1),
        (2.0, torch.nan, 8.0, 1),
        (2.0, 1.0, 8.0, 0),
        (torch.nan, torch.nan, 8.0, 0),
        (2.0, torch.inf, 1.0, 0),
    ],
)
def test_what_is_an_overflow(loss: float, norm: float, scale: float, overflow: int) -> None:
    """Not a loss that is no number, nor a gradient that is none whatever the scale: these the guard judges."""
    found = LossScale(CPU, {"scale": scale}).overflowed({"causal": torch.tensor(loss)}, torch.tensor(norm))
    assert found.item() == overflow


def test_a_machine_without_what_float8_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"compute capability 8.9, and this is cpu"):
        check_precision("fp8", CPU, "Replicated")
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(TrainingError, match=r"this is A100, 8.0"):
        check_precision("fp8", cuda, "Replicated")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrainingError, match="torchao, which is not installed"):
        check_precision("fp8", cuda, "Replicated")
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda _: object())
    check_precision("fp8", cuda, "Replicated")
    with pytest.raises(TrainingError, match="divided over ranks"):
        check_precision("fp8", cuda, "FullySharded")
    with pytest.raises(TrainingError, match="before they can be unscaled"):
        check_precision("fp16", CPU, "Zero")
    for name in ("fp32", "bf16", "fp16"):
        check_precision(name, CPU, "FullySharded")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["fp16", "fp8"])
def test_on_a_gpu_it_learns_as_bfloat16_does(tmp_path: Path, text_folder: Path, kind: str) -> None:
    if kind == "fp8":
        pytest.importorskip("torchao")
    found = {
        name: losses(run(tmp_path, text_folder, name, steps=20, **{"train.precision": name})) for name in (kind, "bf16")
    }
    assert found[kind] == pytest.approx(found["bf16"], rel=0.03)


def test_weights_masters_and_states_must_be_float32() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    require_float32(dict(model.named_parameters()), optimizer)
    half = torch.nn.Linear(2, 2).bfloat16()
    with pytest.raises(TrainingError, match="^weight is of bfloat16"):
        require_float32(dict(half.named_parameters()), optimizer)
    with pytest.raises(TrainingError, match="^a weight of the optimiser is of bfloat16"):
        require_float32(dict(model.named_parameters()), torch.optim.AdamW(half.parameters()))
    optimizer.state[model.weight]["exp_avg"] = torch.zeros(2, 2, dtype=torch.float16)
    with pytest.raises(TrainingError, match="^exp_avg is of float16"):
        require_float32(dict(model.named_parameters()), optimizer)


@pytest.mark.parametrize(
    ("cpu_info", "answer"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_vnni\n", False),
        ("vendor_id\t: GenuineIntel\nmodel name\t: bf16 in a name\nflags\t\t: fpu avx512f avx512_bf16\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd sve svebf16 i8mm bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("", False),
        (None, False),
    ],
)
def test_the_processor_says_whether_it_multiplies_bfloat16(tmp_path: Path, cpu_info: str | None, answer: bool) -> None:
    path = tmp_path / "cpuinfo"
    if cpu_info is not None:
        path.write_text(cpu_info, encoding="utf-8")
    assert bf16_is_faster("cpu", cpu_info=path) is answer


def test_left_to_the_device_a_run_keeps_what_it_began_with(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that would choose otherwise, and where another run branches off."""
    stable = {"train.precision": "auto", "schedule": {"kind": "constant", "warmup_tokens": 1024}}
    monkeypatch.setattr(launch, "bf16_is_faster", lambda _: True)
    path = run(tmp_path, text_folder, "run", steps=3, **stable)
    assert load_recipe(path / "recipe.yaml").recipe.train.precision == "bf16"
    monkeypatch.setattr(launch, "bf16_is_faster", lambda _: False)
    run(tmp_path, text_folder, "run", steps=6, **stable)
    bf16 = run(tmp_path, text_folder, "bf16", steps=6, **{**stable, "train.precision": "bf16"})
    fp32 = run(tmp_path, text_folder, "fp32", steps=6, **stable)
    assert losses(path) == losses(bf16) != losses(fp32)
    assert load_recipe(fp32 / "recipe.yaml").recipe.train.precision == "fp32"
    branched = branch_recipe(f"{path}@3", recipe=tmp_path / "run.yaml").recipe
    assert branched.train.precision == "bf16"
    left = branched.train.model_copy(update={"precision": "auto"})
    assert with_precision(branched.model_copy(update={"train": left})).train.precision == "bf16"

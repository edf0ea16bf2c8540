"""Products of linear layers in CPU steps, against plain float32 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmssl.model import native
from lmssl.model.linear import linear, weight_gradient

pytestmark = pytest.mark.skipif(not native.processor_can(torch.bfloat16), reason="no AVX-512 for bfloat16")


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    assert native.load()


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(100, 48, 80), (1, 16, 16), (257, 1328, 48), (513, 80, 2064), (0, 32, 16), (300, 2576, 1296)],
)
def test_a_weights_gradient_is_summed_in_float32(tokens: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(1)
    grad, hidden = torch.randn(tokens, outputs).bfloat16(), torch.randn(tokens, inputs).bfloat16()
    wanted = grad.double().T @ hidden.double()
    torch.testing.assert_close(weight_gradient(grad, hidden).double(), wanted, rtol=1e-5, atol=1e-4)
    apart = weight_gradient(grad.T.contiguous().T, torch.cat([hidden, hidden], dim=1)[:, :inputs])
    assert torch.equal(apart, weight_gradient(grad, hidden))  # however its sides are laid out


def test_threads_do_not_change_a_bit() -> None:
    torch.manual_seed(2)
    grad, hidden = torch.randn(300, 208).bfloat16(), torch.randn(300, 96).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 4, 7):
            torch.set_num_threads(number)
            found.append(weight_gradient(grad, hidden))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_what_is_no_number_stays_none() -> None:
    grad, hidden = torch.ones(40, 32).bfloat16(), torch.ones(40, 32).bfloat16()
    grad[33, 5] = torch.nan
    bad = weight_gradient(grad, hidden).isnan()
    assert bad[5].all() and int(bad.sum()) == 32


def test_the_operator_keeps_torchs_contract() -> None:
    sides = torch.randn(4, 32).bfloat16(), torch.randn(4, 16).bfloat16()
    torch.library.opcheck(torch.ops.lmssl.weight_gradient.default, sides)


@pytest.mark.parametrize("outputs", [64, 50])
@pytest.mark.parametrize(("of_hidden", "of_weight"), [(True, True), (False, True), (True, False)])
def test_a_compiled_product_and_its_gradients(outputs: int, of_hidden: bool, of_weight: bool) -> None:
    torch.manual_seed(3)
    hidden = torch.randn(2, 30, 48, requires_grad=of_hidden)
    weight, grad = torch.randn(outputs, 48, requires_grad=of_weight), torch.randn(2, 30, outputs)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear(hidden, weight)

    torch._dynamo.reset()
    found, wanted = torch.compile(run, backend="aot_eager", dynamic=False)(hidden, weight), F.linear(hidden, weight)
    assert found.dtype == torch.bfloat16
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    ours = torch.autograd.grad(found, inputs, grad.bfloat16())
    for a, b in zip((found, *ours), (wanted, *torch.autograd.grad(wanted, inputs, grad)), strict=True):
        assert (a.float() - b).norm() < 0.005 * b.norm()
    assert all(a.dtype == torch.float32 for a in ours)


def test_products_of_several_weights_are_one() -> None:
    torch.manual_seed(4)
    hidden, grad = torch.randn(40, 32, requires_grad=True), torch.randn(40, 96)
    weights = [torch.randn(rows, 32, requires_grad=True) for rows in (16, 48, 32)]
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(hidden, *weights)
    wanted = F.linear(hidden, torch.cat(weights))
    ours = torch.autograd.grad(found, [hidden, *weights], grad.bfloat16())
    exact = torch.autograd.grad(wanted, [hidden, *weights], grad)
    for a, b in zip((found, *ours), (wanted, *exact), strict=True):
        assert a.shape == b.shape and (a.float() - b).norm() < 0.005 * b.norm()
    assert torch.equal(linear(hidden, *weights), wanted)  # in float32 it is torch's


@pytest.mark.parametrize(("recorded", "trained"), [(True, True), (True, False), (False, True)])
def test_nothing_breaks_a_graph(recorded: bool, trained: bool) -> None:
    hidden, weights = torch.randn(40, 32), [torch.randn(16, 32, requires_grad=trained) for _ in range(2)]

    def run(hidden: Tensor, first: Tensor, second: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(recorded):
            return linear(hidden, first, second)

    torch._dynamo.reset()
    with torch.set_grad_enabled(recorded):
        found = torch.compile(run, backend="eager", dynamic=False, fullgraph=True)(hidden, *weights)
    torch.testing.assert_close(found.float(), F.linear(hidden, torch.cat(weights)), rtol=0.05, atol=0.05)

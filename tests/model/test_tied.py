"""The two gradients of a tied matrix as one operator: the same sum, and only where it is one."""

from __future__ import annotations

import pytest
import torch

from lmssl.model import native
from lmssl.model.pointwise import embedding_gradient, tied_gradient  # noqa: F401  (registers the operators)
from lmssl.model.tied import JoinTiedGradients

pytestmark = pytest.mark.skipif(not native.processor_can(), reason="the processor has no AVX2")

VOCABULARY, WIDTH = 64, 32


def graph_of(*, swapped: bool = False, used_twice: bool = False) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    product, factor, rows, ids = (graph.placeholder(name) for name in ("product", "factor", "rows", "ids"))
    operators = torch.ops.lmssl
    head = graph.call_function(operators.scaled_gradient.default, (product, factor, WIDTH))
    embedding = graph.call_function(operators.embedding_gradient.default, (rows, ids, VOCABULARY, 3))
    both = (embedding, head) if swapped else (head, embedding)
    total = graph.call_function(torch.ops.aten.add.Tensor, both)
    graph.output((total, embedding) if used_twice else (total,))
    return graph


def targets(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_becomes_one_operator(dtype: torch.dtype, swapped: bool) -> None:
    if not native.processor_can(dtype):
        pytest.skip("no AVX-512 for bfloat16")
    assert native.load()
    torch.manual_seed(0)
    inputs = (
        *(torch.randn(WIDTH + 1, VOCABULARY).to(dtype), torch.tensor(0.4)),
        *(torch.randn(50, WIDTH), torch.randint(0, VOCABULARY, (50,))),
    )
    before, after = graph_of(swapped=swapped), graph_of(swapped=swapped)
    JoinTiedGradients()(after)
    after.lint()
    assert targets(after) == {"lmssl.tied_gradient.default"}
    wanted, found = (torch.fx.GraphModule({}, graph)(*inputs)[0] for graph in (before, after))
    torch.testing.assert_close(found, wanted)


def test_what_is_used_elsewhere_too_stays() -> None:
    graph = graph_of(used_twice=True)
    before = targets(graph)
    JoinTiedGradients()(graph)
    assert targets(graph) == before


def test_torchs_cache_tells_versions_apart() -> None:
    assert JoinTiedGradients().uuid() == JoinTiedGradients().uuid() != ""

"""One pass over the gradient of a matrix that is both embedding and head, in graphs that torch's compiler makes.

Autograd adds the gradients of the two uses: the head's is dense, the embedding's has rows for the tokens of a batch and
zeros elsewhere. Two matrices are written and read again where one and a few rows would do, which on CPU is a tenth of
what a small model's step reads and writes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass


class JoinTiedGradients(CustomGraphPass):
    """Makes `scaled_gradient + embedding_gradient` one operator."""

    def __call__(self, graph: torch.fx.graph.Graph) -> None:
        """Rewrite a graph in place; one without the sum stays as it is."""
        operators = torch.ops.lmssl
        head, embedding = operators.scaled_gradient.default, operators.embedding_gradient.default
        for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)):
            parts = {getattr(part, "target", None): part for part in node.args}
            if len(node.args) != 2 or set(parts) != {head, embedding}:
                continue
            if any(len(part.users) > 1 for part in parts.values()):
                continue
            rows, ids, _, padding = parts[embedding].args
            with graph.inserting_before(node):
                joined = graph.call_function(operators.tied_gradient.default, (*parts[head].args, rows, ids, padding))
            joined.meta.update(node.meta)
            node.replace_all_uses_with(joined)
            for old in (node, *parts.values()):
                graph.erase_node(old)

    def uuid(self) -> Any:
        """What torch's cache of compiled graphs tells versions of this pass apart by."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

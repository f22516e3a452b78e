"""one_node: an address for the ranks does not make several nodes of one.

Why: up to 0.5.18 the engine takes --dist-init-addr for a sign of several nodes. On one node, where trainers pass
it too, features are then pickled inside of their requests, to every rank.
Upstream: #35646, which goes by the number of nodes.
How: the function that decides is asked for several nodes only. Tokenizers and ranks ask the same one; what
receives from encoders has one of its own.
When it can go: with the oldest supported engine at 0.5.19.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mmlane.compat import matrix
from mmlane.engine.launch import is_elastic
from mmlane.patching import Target


def _by_nodes(determine: Callable[[Any], str]) -> Callable[[Any], str]:
    @wraps(determine)
    def determine_tensor_transport_mode(server_args: Any) -> str:
        # Ranks of an elastic launch may come from elsewhere, by the address alone.
        if server_args.nnodes > 1 or is_elastic(server_args):
            return determine(server_args)
        return "cuda_ipc"  # what it says of one node

    return determine_tensor_transport_mode


SPEC = matrix().spec(
    "one_node",
    targets=(
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="_determine_tensor_transport_mode",
            signature="(server_args)",
            replace=_by_nodes,
            before="0.5.18",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="determine_tensor_transport_mode",
            signature="(server_args)",
            replace=_by_nodes,
            since="0.5.18",
            before="0.5.19",
        ),
        Target(
            module="sglang.srt.disaggregation.encode_receiver",
            name="_determine_tensor_transport_mode",
            signature="(server_args)",
            replace=_by_nodes,
            before="0.5.19",
        ),
    ),
    relies_on=("sglang.srt.multimodal.transport.determine_tensor_transport_mode",),
)

"""one_node: only several nodes are taken for several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmlane_patches import one_node


def as_published(server_args: Any) -> str:
    return "default" if server_args.dist_init_addr else "cuda_ipc"


@pytest.mark.parametrize(
    ("address", "nnodes", "mode"),
    [
        (None, 1, "cuda_ipc"),
        ("127.0.0.1:2000", 1, "cuda_ipc"),
        ("127.0.0.1:2000", 2, "default"),
        (None, 2, "cuda_ipc"),
    ],
)
def test_the_number_of_nodes_decides(address: str | None, nnodes: int, mode: str) -> None:
    """Where it says several, what the engine said stands."""
    determine = one_node._by_nodes(as_published)
    assert determine(SimpleNamespace(dist_init_addr=address, nnodes=nnodes)) == mode

"""`one_node`: a launch with an address counts as several nodes only if it has several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmlane_patches import one_node


def as_published(server_args: Any) -> str:
    return "default" if server_args.dist_init_addr else "cuda_ipc"


@pytest.mark.parametrize(
    ("address", "more", "mode"),
    [
        (None, {"nnodes": 1}, "cuda_ipc"),
        ("127.0.0.1:2000", {"nnodes": 1}, "cuda_ipc"),
        ("127.0.0.1:2000", {"nnodes": 1, "elastic_ep_backend": None}, "cuda_ipc"),
        ("127.0.0.1:2000", {"nnodes": 1, "elastic_ep_backend": "mooncake"}, "default"),
        ("127.0.0.1:2000", {"nnodes": 2}, "default"),
        (None, {"nnodes": 2}, "cuda_ipc"),
    ],
)
def test_the_number_of_nodes_decides(address: str | None, more: dict[str, Any], mode: str) -> None:
    """Where it says several, or more may come, what the engine said stands."""
    determine = one_node._by_nodes(as_published)
    assert determine(SimpleNamespace(dist_init_addr=address, **more)) == mode

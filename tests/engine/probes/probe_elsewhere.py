"""A fake second node: of two data-parallel replicas, mmlane takes the second for one on another node.

The engine itself has them there with DP-attention only, in which its models cannot run on a CPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from when_imported import when_imported


def place_the_second_elsewhere(topology: ModuleType) -> None:
    def replicas_elsewhere(server_args: Any) -> list[int]:
        return [1]

    topology.replicas_elsewhere = replicas_elsewhere  # type: ignore[attr-defined]


when_imported("mmlane.engine.topology", place_the_second_elsewhere)

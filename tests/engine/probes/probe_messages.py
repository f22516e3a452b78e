"""Notes each message between ranks that mmlane sends: one line in $NOTES/PID.messages.

A line is the name of what torch.distributed offers for it, a collective or a call of the store; behind it
`heartbeat`, if it is that of an idle link, which comes each second here. A message that the engine sends is not
mmlane's, also where mmlane surrounds the engine's function: the nearest frame outside of torch decides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from when_imported import when_imported

OURS = ("mmlane", "mmlane_patches")
SENDING = (
    "send", "broadcast", "allreduce", "allreduce_coalesced", "reduce", "allgather", "_allgather_base",
    "allgather_coalesced", "allgather_into_tensor_coalesced", "gather", "scatter", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "barrier",
    "monitored_barrier",
)  # fmt: skip
ASKING = ("set", "compare_set", "get", "check", "wait", "add", "append", "multi_get", "multi_set", "delete_key")


def watch(distributed: ModuleType) -> None:
    for owner in (distributed.ProcessGroup, distributed.ProcessGroupGloo):
        surround(owner, SENDING)
    for owner in (distributed.Store, distributed.TCPStore, distributed.PrefixStore):
        surround(owner, ASKING)


def surround(owner: Any, names: tuple[str, ...]) -> None:
    for name in names:
        method = getattr(owner, name, None)
        if method is not None and not hasattr(method, "__wrapped__"):  # else it is inherited, and noted there
            setattr(owner, name, noted(name, method))


def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_ours(sys._getframe(1)):
            line = f"{name} heartbeat" if is_heartbeat(sys._getframe(1)) else name
            with Path(os.environ["NOTES"], f"{os.getpid()}.messages").open("a") as file:
                file.write(f"{line}\n")
        return method(*args, **kwargs)

    return call


def is_ours(caller: FrameType) -> bool:
    for package in (name.partition(".")[0] for name, _ in frames(caller)):
        if package != "torch":
            return package in OURS
    return False


def is_heartbeat(caller: FrameType) -> bool:
    """The first rank's crossing of nothing, and a leader's answer to that."""
    for name, frame in frames(caller):
        if name == "mmlane.transport.crossing" and frame.f_code.co_name == "_landed":
            crossing = frame.f_locals["crossing"]
            return not (crossing.pieces or crossing.let_go)
        if name == "mmlane.transport.crossing" and frame.f_code.co_name == "_tell":
            return not frame.f_locals["landed"]
    return False


def frames(frame: FrameType | None) -> Iterator[tuple[str, FrameType]]:
    """With the names of their modules, outwards."""
    while frame is not None:
        yield str(frame.f_globals.get("__name__")), frame
        frame = frame.f_back


def often(link: ModuleType) -> None:
    link.HEARTBEAT_S = 1.0  # type: ignore[attr-defined]


when_imported("torch.distributed", watch)
when_imported("mmlane.transport.crossing", often)

"""A request goes by its own manager's lane, and one that cannot be sent leaves no segment behind."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane_patches import lanes  # noqa: E402
from mmlane_patches.pointer import PREFIX, SHM, SegmentPointer  # noqa: E402
from mmlane_patches.sending import by_lane, unlink_if_unsent  # noqa: E402


class Unpicklable:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("mine")


def segments() -> list[str]:
    return [file.name for file in SHM.glob(f"{PREFIX}{os.getpid()}_*")]


def send(self: Any, request: list[Any]) -> bytes:
    request[0] = SegmentPointer(request[0])
    return pickle.dumps(request)


async def send_async(self: Any, request: list[Any]) -> bytes:
    await asyncio.sleep(0)
    return send(self, request)


def call(function: Callable[..., Any], request: list[Any]) -> Any:
    result = function(None, request)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


@pytest.mark.parametrize("function", [send, send_async])
def test_only_what_was_sent_stays(function: Callable[..., Any]) -> None:
    with pytest.raises(pickle.PicklingError):
        call(function, [torch.ones(8), Unpicklable()])
    assert len(segments()) == 1  # the fault: the pointer had been pickled when its request failed
    for name in segments():
        (SHM / name).unlink()

    patched = unlink_if_unsent(function)
    with pytest.raises(pickle.PicklingError):
        call(patched, [torch.ones(8), Unpicklable()])
    assert segments() == []
    received = pickle.loads(call(patched, [torch.ones(8), "text"]))
    assert len(segments()) == 1
    assert torch.equal(received[0].materialize(), torch.ones(8))
    assert segments() == []


class Manager:
    """What a tokenizer manager is to `lanes`: something to look up a producer by."""

    def send(self, fails: bool) -> Any:
        if fails:
            raise OSError("mine")
        return lanes.producer.get()

    async def send_async(self, fails: bool) -> Any:
        await asyncio.sleep(0)
        return self.send(fails)


@pytest.mark.parametrize("name", ["send", "send_async"])
def test_each_manager_has_its_own_lane(name: str) -> None:
    """Several engines may be in one process, and some of them without a lane."""
    managers = [Manager() for _ in range(3)]
    for manager in managers[:2]:
        lanes.producers[manager] = lanes.Producer({"dp0": 1})
    patched = by_lane(getattr(Manager, name))

    async def all_at_once() -> list[Any]:
        sent = [patched(manager, False) for manager in managers]
        return await asyncio.gather(*sent) if name == "send_async" else sent

    assert asyncio.run(all_at_once()) == [*(lanes.producers[manager] for manager in managers[:2]), None]
    failing = patched(managers[0], True) if name == "send_async" else None
    with pytest.raises(OSError, match="mine"):
        asyncio.run(failing) if failing is not None else patched(managers[0], True)
    assert lanes.producer.get() is None

"""A request goes by its own manager's lane, and one that cannot be sent leaves no segment behind.

A request that has no multimodal inputs meets none of it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane_patches import lanes  # noqa: E402
from mmlane_patches.pointer import PREFIX, SHM, SegmentPointer, made_here  # noqa: E402
from mmlane_patches.sending import by_lane, unlink_if_unsent, with_samples  # noqa: E402


class Unpicklable:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("mine")


def segments() -> list[str]:
    return [file.name for file in SHM.glob(f"{PREFIX}{os.getpid()}_*")]


def send(self: Any, tokenized_obj: Any) -> bytes:
    tokenized_obj.mm_inputs[0] = SegmentPointer(tokenized_obj.mm_inputs[0])
    return pickle.dumps(tokenized_obj.mm_inputs)


async def send_async(self: Any, tokenized_obj: Any) -> bytes:
    await asyncio.sleep(0)
    return send(self, tokenized_obj)


def call(function: Callable[..., Any], *parts: Any) -> Any:
    result = function(None, SimpleNamespace(mm_inputs=list(parts)))
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


@pytest.mark.parametrize("function", [send, send_async])
def test_only_what_was_sent_stays(function: Callable[..., Any]) -> None:
    with pytest.raises(pickle.PicklingError):
        call(function, torch.ones(8), Unpicklable())
    assert len(segments()) == 1  # the fault: the pointer had been pickled when its request failed
    for name in segments():
        (SHM / name).unlink()

    patched = unlink_if_unsent(function)
    with pytest.raises(pickle.PicklingError):
        call(patched, torch.ones(8), Unpicklable())
    assert segments() == []
    received = pickle.loads(call(patched, torch.ones(8), "text"))
    assert len(segments()) == 1
    assert torch.equal(received[0].materialize(), torch.ones(8))
    assert segments() == []


REQUEST = SimpleNamespace(mm_inputs={})
TEXT = SimpleNamespace(mm_inputs=None)


class Manager:
    """What a tokenizer manager is to `lanes`: something to look up a producer by."""

    fails = False

    def send(self, tokenized_obj: Any) -> Any:
        if self.fails:
            raise OSError("mine")
        return lanes.producer.get(), made_here.get()

    def send_as_0_5_9(self, obj: Any, tokenized_obj: Any, created_time: Any = None) -> Any:
        return self.send(tokenized_obj)

    async def send_async(self, tokenized_obj: Any) -> Any:
        await asyncio.sleep(0)
        return self.send(tokenized_obj)


@pytest.mark.parametrize("name", ["send", "send_async"])
def test_each_manager_has_its_own_lane(name: str) -> None:
    """Several engines may be in one process, and some of them without a lane."""
    managers = [Manager() for _ in range(3)]
    for manager in managers[:2]:
        lanes.producers[manager] = lanes.Producer({"dp0": 1})
    patched = by_lane(getattr(Manager, name))

    async def all_at_once() -> list[Any]:
        sent = [patched(manager, REQUEST) for manager in managers]
        return await asyncio.gather(*sent) if name == "send_async" else sent

    used = [producer for producer, _ in asyncio.run(all_at_once())]
    assert used == [*(lanes.producers[manager] for manager in managers[:2]), None]
    managers[0].fails = True
    failing = patched(managers[0], REQUEST) if name == "send_async" else None
    with pytest.raises(OSError, match="mine"):
        asyncio.run(failing) if failing is not None else patched(managers[0], REQUEST)
    assert lanes.producer.get() is None


@pytest.mark.parametrize("context", [by_lane, unlink_if_unsent])
def test_a_text_only_request_is_sent_as_if_nothing_stood_here(context: Callable[..., Any]) -> None:
    manager = Manager()
    lanes.producers[manager] = lanes.Producer({"dp0": 1})
    text = (None, None)
    assert context(Manager.send)(manager, TEXT) == text
    assert context(Manager.send)(manager, tokenized_obj=TEXT) == text
    assert context(Manager.send_as_0_5_9)(manager, REQUEST, TEXT, 1.0) == text
    assert asyncio.run(context(Manager.send_async)(manager, TEXT)) == text
    assert context(Manager.send)(manager, tokenized_obj=REQUEST) != text
    assert context(Manager.send_as_0_5_9)(manager, TEXT, REQUEST) != text
    assert asyncio.run(context(Manager.send_async)(manager, REQUEST)) != text


class Samples:
    """A manager that answers a request for samples with what it could share, once for each step."""

    def __init__(self) -> None:
        self.ended = False
        self.seen: list[Any] = []

    async def handle(self, obj: Any, request: Any = None) -> Any:
        try:
            for step in range(3):
                await asyncio.sleep(0)
                self.seen.append(lanes.samples.get())
                if step == obj.fails:
                    raise OSError("mine")
                yield step
        finally:
            self.ended = True


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(lanes.Samples, "close", lambda samples: found.append(samples))
    return found


def test_the_samples_of_a_request_are_together_while_it_is_handled(closed: list[Any]) -> None:
    handle = with_samples(Samples.handle)

    async def both() -> list[Any]:
        """Two requests at a time, and what this task itself sees meanwhile."""
        responses = [handle(manager, SimpleNamespace(parallel_sample_num=4, fails=-1)) for manager in managers]
        got = []
        for _ in range(3):
            got += [await anext(each) for each in responses]
            assert lanes.samples.get() is None
        for each in responses:
            with pytest.raises(StopAsyncIteration):
                await anext(each)
        return got

    managers = [Samples(), Samples()]
    assert asyncio.run(both()) == [0, 0, 1, 1, 2, 2]
    first, second = ({id(seen) for seen in manager.seen} for manager in managers)
    assert len(first) == len(second) == 1 and first != second
    assert [id(samples) for samples in closed] == [*first, *second]


@pytest.mark.parametrize("how", ["fails", "is left", "is cancelled"])
def test_a_request_that_does_not_end_as_it_should_closes_its_samples(how: str, closed: list[Any]) -> None:
    manager = Samples()
    responses = with_samples(Samples.handle)(
        manager, SimpleNamespace(parallel_sample_num=2, fails=1 if how == "fails" else -1)
    )

    async def use() -> None:
        assert await anext(responses) == 0
        if how == "fails":
            with pytest.raises(OSError, match="mine"):
                await anext(responses)
        elif how == "is left":
            await responses.aclose()
        else:
            waiting = asyncio.ensure_future(anext(responses))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(use())
    assert manager.ended and len(closed) == 1


@pytest.mark.parametrize("obj", [SimpleNamespace(fails=-1), SimpleNamespace(parallel_sample_num=1, fails=-1)])
def test_a_request_for_one_sample_is_handled_as_if_nothing_stood_here(obj: Any, closed: list[Any]) -> None:
    manager = Samples()
    responses = with_samples(Samples.handle)(manager, obj)
    assert responses.ag_code is Samples.handle.__code__

    async def all_of() -> list[Any]:
        return [response async for response in responses]

    assert asyncio.run(all_of()) == [0, 1, 2]
    assert manager.seen == [None] * 3 and closed == []

"""A request goes by its own manager's transports, and one that cannot be sent leaves no segment behind.

A request that has no multimodal inputs meets none of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from mmlane.transport import samples  # noqa: E402
from mmlane.transport.base import Tokenizer  # noqa: E402
from mmlane.transport.chain import Chain  # noqa: E402
from mmlane.transport.pointer import ShmPointerMMData, slot  # noqa: E402
from mmlane.transport.segment import PREFIX, SHM  # noqa: E402
from mmlane.transport.tokenizer_side import (  # noqa: E402
    SIDE,
    Sending,
    TokenizerSide,
    around_send,
    sending,
    with_samples,
    wrap_everything,
)
from tests.unit.launches import without_a_side  # noqa: E402


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's module, where pickle looks for the class, in a process whose segments are ours."""
    without_a_side(monkeypatch)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("mine")


def segments() -> list[str]:
    return [file.name for file in SHM.glob(f"{PREFIX}{os.getpid()}_*")]


def send(self: Any, tokenized_obj: Any) -> bytes:
    tokenized_obj.mm_inputs[0] = ShmPointerMMData(tokenized_obj.mm_inputs[0])
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

    patched = around_send(function, (sending,))
    with pytest.raises(pickle.PicklingError):
        call(patched, torch.ones(8), Unpicklable())
    assert segments() == []
    received = pickle.loads(call(patched, torch.ones(8), "text"))
    assert len(segments()) == 1
    assert torch.equal(received[0].materialize(), torch.ones(8))
    assert segments() == []


REQUEST = SimpleNamespace(mm_inputs={})
TEXT = SimpleNamespace(mm_inputs=None)


class Meanwhile(NamedTuple):
    """The request that is being sent, and what it has then."""

    chain: Chain
    samples: samples.Samples | None
    request: Sending


class Manager:
    """What a tokenizer manager is here: something that may have a side."""

    fails = False

    def give_side(self) -> TokenizerSide:
        side = TokenizerSide(Tokenizer({"dp0": 1}))
        setattr(self, SIDE, side)
        return side

    def send(self, tokenized_obj: Any) -> Meanwhile | None:
        """What a pointer that is made meanwhile would find."""
        if self.fails:
            raise OSError("mine")
        current = slot.scope.get()
        return None if current is None else Meanwhile(current._chain, current.samples, current)

    def send_as_0_5_9(self, obj: Any, tokenized_obj: Any, created_time: Any = None) -> Any:
        return self.send(tokenized_obj)

    async def send_async(self, tokenized_obj: Any) -> Any:
        await asyncio.sleep(0)
        return self.send(tokenized_obj)


@pytest.mark.parametrize("name", ["send", "send_async"])
def test_each_manager_has_its_own_lane(name: str) -> None:
    """Several engines may be in one process, and some of them without a lane."""
    managers = [Manager() for _ in range(3)]
    sides = [manager.give_side() for manager in managers[:2]]
    patched = around_send(getattr(Manager, name), (sending,))

    async def all_at_once() -> list[Any]:
        sent = [patched(manager, REQUEST) for manager in managers]
        return await asyncio.gather(*sent) if name == "send_async" else sent

    used = [found.chain for found in asyncio.run(all_at_once())]
    assert used == [*(side.chain for side in sides), slot.chain]
    assert sides[0].producer is not sides[1].producer
    managers[0].fails = True
    failing = patched(managers[0], REQUEST) if name == "send_async" else None
    with pytest.raises(OSError, match="mine"):
        asyncio.run(failing) if failing is not None else patched(managers[0], REQUEST)
    assert slot.scope.get() is None


entered: list[Any] = []


@contextmanager
def noted(manager: Any, request: Any) -> Iterator[None]:
    """Another patch's step."""
    entered.append(request)
    yield


@pytest.mark.parametrize(
    "steps", [(sending,), (noted, sending), (sending, noted)], ids=["alone", "inner", "outer"]
)
def test_a_text_only_request_is_sent_as_if_nothing_stood_here(steps: tuple[Any, ...]) -> None:
    manager = Manager()
    manager.give_side()
    send, send_as_0_5_9, send_async = (
        around_send(function, steps) for function in (Manager.send, Manager.send_as_0_5_9, Manager.send_async)
    )
    entered.clear()
    assert send(manager, TEXT) is None
    assert send(manager, tokenized_obj=TEXT) is None
    assert send_as_0_5_9(manager, REQUEST, TEXT, 1.0) is None
    assert asyncio.run(send_async(manager, TEXT)) is None
    assert entered == []
    assert send(manager, tokenized_obj=REQUEST) is not None
    assert send_as_0_5_9(manager, TEXT, REQUEST) is not None
    assert asyncio.run(send_async(manager, REQUEST)) is not None
    assert entered == [REQUEST] * 3 * (noted in steps)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["send", "send_async"])
def test_the_first_step_is_the_outermost(name: str, fails: bool) -> None:
    seen: list[Any] = []

    def step(word: str) -> Any:
        @contextmanager
        def around(manager: Any, request: Any) -> Iterator[None]:
            seen.append((word, manager, request))
            try:
                yield
            finally:
                seen.append(f"end of {word}")

        return around

    manager = Manager()
    manager.fails = fails
    patched = around_send(getattr(Manager, name), (step("first"), step("second")))
    with pytest.raises(OSError, match="mine") if fails else nullcontext():
        result = patched(manager, REQUEST)
        if name == "send_async":
            asyncio.run(result)
    assert seen == [("first", manager, REQUEST), ("second", manager, REQUEST), "end of second", "end of first"]


class Samples:
    """A manager that answers a request for samples with what it could share, once for each step."""

    def __init__(self) -> None:
        self.ended = False
        self.seen: list[Any] = []

    async def handle(self, obj: Any, request: Any = None) -> Any:
        try:
            for step in range(3):
                await asyncio.sleep(0)
                around = slot.scope.get()
                self.seen.append(None if around is None else around.samples)
                if step == obj.fails:
                    raise OSError("mine")
                yield step
        finally:
            self.ended = True


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(samples.Samples, "close", lambda ended: found.append(ended))
    return found


def test_the_samples_of_a_request_are_together_while_it_is_handled(closed: list[Any]) -> None:
    handle = with_samples(Samples.handle)

    async def both() -> list[Any]:
        """Two requests at a time, and what this task itself sees meanwhile."""
        responses = [handle(manager, SimpleNamespace(parallel_sample_num=4, fails=-1)) for manager in managers]
        got = []
        for _ in range(3):
            got += [await anext(each) for each in responses]
            assert slot.scope.get() is None
        for each in responses:
            with pytest.raises(StopAsyncIteration):
                await anext(each)
        return got

    managers = [Samples(), Samples()]
    assert asyncio.run(both()) == [0, 0, 1, 1, 2, 2]
    first, second = ({id(seen) for seen in manager.seen} for manager in managers)
    assert len(first) == len(second) == 1 and first != second
    assert [id(ended) for ended in closed] == [*first, *second]


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


def test_a_request_that_is_one_of_several_samples_goes_by_its_managers_lane(closed: list[Any]) -> None:
    """And tells the lane which requests share a tensor with it."""
    manager = Manager()
    side = manager.give_side()
    send = around_send(Manager.send_async, (sending,))

    async def handle(self: Any, obj: Any) -> Any:
        for _ in range(3):
            yield await send(self, REQUEST)

    async def all_of() -> list[Any]:
        return [found async for found in with_samples(handle)(manager, SimpleNamespace(parallel_sample_num=2))]

    sent = asyncio.run(all_of())
    assert [found.chain for found in sent] == [side.chain] * 3
    assert [found.samples for found in sent] == closed * 3 and len(closed) == 1
    assert len({id(found.request) for found in sent}) == 3  # each is taken back by itself


# --- wrapping on 0.5.9 - 0.5.12 -----------------------------------------------------------------------------


def request(*values: Any, field: str, as_dict: bool = False) -> Any:
    items = [SimpleNamespace(feature=None, precomputed_embeddings=None) for _ in values]
    for item, value in zip(items, values, strict=True):
        setattr(item, field, value)
    return SimpleNamespace(mm_inputs={"mm_items": items} if as_dict else SimpleNamespace(mm_items=items))


def native_wrap(as_dict: bool, enabled: bool) -> Callable[[Any], Any]:
    def wrap_shm_features(obj: Any) -> Any:
        if enabled:
            for item in obj.mm_inputs.get("mm_items", []) if as_dict else obj.mm_inputs.mm_items:
                if isinstance(item.feature, torch.Tensor):
                    item.feature = ShmPointerMMData(item.feature)
        return obj

    return wrap_everything(wrap_shm_features)


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
@pytest.mark.parametrize("field", ["feature", "precomputed_embeddings"])
def test_lists_and_embeddings_go_by_pointer(field: str, as_dict: bool) -> None:
    tensor = torch.ones(2)
    req = request(tensor, [tensor, "x"], (tensor,), field=field, as_dict=as_dict)
    assert native_wrap(as_dict, True)(req) is req
    items = req.mm_inputs["mm_items"] if as_dict else req.mm_inputs.mm_items
    first, second, third = (getattr(item, field) for item in items)
    assert isinstance(first, ShmPointerMMData)
    assert isinstance(third, tuple) and isinstance(third[0], ShmPointerMMData)
    assert isinstance(second[0], ShmPointerMMData) and second[1] == "x"


def test_the_engines_own_conditions_hold_for_them_too() -> None:
    tensor = torch.ones(2)
    req = request([tensor], field="precomputed_embeddings")
    native_wrap(False, False)(req)
    assert req.mm_inputs.mm_items[0].precomputed_embeddings == [tensor]


def test_who_copies_the_context_of_a_request_keeps_nothing_of_it() -> None:
    """As `asyncio.create_task` does: a task that outlives the request keeps neither its features nor its lane."""
    manager = Manager()
    side = TokenizerSide(Tokenizer({"dp0": 1}))
    setattr(manager, SIDE, side)
    kept = []

    def send_and_copy(self: Any, tokenized_obj: Any) -> None:
        kept.append(contextvars.copy_context())
        kept[0].run(ShmPointerMMData, torch.ones(1 << 20))

    around_send(send_and_copy, (sending,))(manager, REQUEST)
    current = kept[0].run(slot.scope.get)
    assert current is not None and current._made == [] and current._chain is slot.chain
    producer = weakref.ref(side.producer)
    del side, manager
    assert producer() is None

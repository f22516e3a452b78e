"""A request goes by its own manager's transports, and one that cannot be sent leaves no segment behind.

A request that has no multimodal inputs meets none of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from mmlane.engine.requests import places  # noqa: E402
from mmlane.host import OUR_PREFIX, SHM  # noqa: E402
from mmlane.transport import samples  # noqa: E402
from mmlane.transport.base import Tokenizer  # noqa: E402
from mmlane.transport.chain import Chain  # noqa: E402
from mmlane.transport.compacting import compacting  # noqa: E402
from mmlane.transport.inline import Inline  # noqa: E402
from mmlane.transport.pointer import ShmPointerMMData, slot  # noqa: E402
from mmlane.transport.segment import Segment  # noqa: E402
from mmlane.transport.sharing import around_samples, with_samples  # noqa: E402
from mmlane.transport.tokenizer_side import (  # noqa: E402
    SIDE,
    Sending,
    TokenizerSide,
    around_send,
    around_send_batch,
    around_wrap,
    offering,
    sending,
)
from tests.unit.launches import engine_takes_pointers, without_a_side  # noqa: E402


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's module, where pickle looks for the class, in a process whose segments are ours."""
    without_a_side(monkeypatch)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("mine")


def segments() -> list[str]:
    return [file.name for file in SHM.glob(f"{OUR_PREFIX}{os.getpid()}_*")]


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


class Found(NamedTuple):
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

    def send(self, tokenized_obj: Any) -> Found | None:
        """What a pointer would find that is made while this sends."""
        if self.fails:
            raise OSError("mine")
        current = slot.scope.get()
        return None if current is None else Found(current._chain, current.shared, current)

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
                self.seen.append(None if around is None else around.shared)
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
    handle = around_samples(Samples.handle, (with_samples,))

    async def both() -> list[Any]:
        """Two requests at a time, and what this task itself sees between their samples."""
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
    responses = around_samples(Samples.handle, (with_samples,))(
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
    responses = around_samples(Samples.handle, (with_samples,))(manager, obj)
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
        return [
            found
            async for found in around_samples(handle, (with_samples,))(
                manager, SimpleNamespace(parallel_sample_num=2)
            )
        ]

    sent = asyncio.run(all_of())
    assert [found.chain for found in sent] == [side.chain] * 3
    assert [found.samples for found in sent] == closed * 3 and len(closed) == 1
    assert len({id(found.request) for found in sent}) == 3  # each is taken back alone


# --- tensors are offered ------------------------------------------------------------------------------------


def an_item(**fields: Any) -> Any:
    return SimpleNamespace(**{"feature": None, "precomputed_embeddings": None, "hash": 7, **fields})


def request(*items: Any, as_dict: bool = False, overrides: Any = None) -> Any:
    there = list(items)
    mm_inputs = {"mm_items": there} if as_dict else SimpleNamespace(mm_items=there)
    return SimpleNamespace(mm_inputs=mm_inputs if items else None, positional_embed_overrides=overrides)


def items_of(sent: Any) -> list[Any]:
    inputs = sent.mm_inputs
    items: list[Any] = inputs["mm_items"] if isinstance(inputs, dict) else inputs.mm_items
    return items


def engines_wrap(obj: Any) -> Any:
    """`wrap_shm_features`, of what every release knows of, in launches in which its ranks take it."""
    if sys.modules[ShmPointerMMData.__module__].get_serving().skip_tokenizer_init:
        return obj
    for item in items_of(obj) if obj.mm_inputs else ():
        if isinstance(item.feature, torch.Tensor):
            item.feature = ShmPointerMMData(item.feature)
    return obj


def sent(obj: Any, *steps: Any, send: Any = None) -> Any:
    """A request as it is pickled, wrapped with these steps."""
    wrap = around_wrap(engines_wrap, steps)

    def send_one_request(self: Any, tokenized_obj: Any) -> Any:
        return wrap(tokenized_obj)

    return around_send(send_one_request, (sending,))(None, obj)


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
@pytest.mark.parametrize("field", ["feature", "precomputed_embeddings"])
def test_tensors_lists_and_embeddings_go_by_pointer(field: str, as_dict: bool) -> None:
    tensor = torch.ones(2)
    obj = request(*(an_item(**{field: value}) for value in (tensor, [tensor, "x"], (tensor,))), as_dict=as_dict)
    before = items_of(obj)
    first, second, third = (getattr(item, field) for item in items_of(sent(obj, offering)))
    assert first.precomputed_hash == 7 and second[0].precomputed_hash is None
    assert isinstance(third, tuple) and isinstance(second, list) and second[1] == "x"
    for pointer in (first, second[0], third[0]):
        assert isinstance(pointer, ShmPointerMMData) and isinstance(pointer.payload, Segment)
        assert torch.equal(pointer.materialize(), tensor)
    assert getattr(before[0], field) is tensor  # they may be those of another sample


def test_what_the_engine_does_not_know_of_goes_by_no_segment() -> None:
    """The ranks would neither agree on it nor take it: without a lane it is sent inline, at its size."""
    whole = torch.zeros(4, 50_000)
    overrides = SimpleNamespace(embeds=whole[3], positions=[1])
    shared = {"crops": whole[0], "parts": [whole[1], [whole[2]]], "grid": [(1, 2)], "word": "x", "empty": []}
    obj = request(
        an_item(feature=torch.ones(2), model_specific_data=shared),
        an_item(model_specific_data=shared),
        overrides=overrides,
    )
    made = sent(obj, offering)
    first, second = (item.model_specific_data for item in items_of(made))
    for data in (first, second):
        got = (data["crops"], data["parts"][0], data["parts"][1][0])
        for tensor, wanted in zip(got, whole, strict=False):
            assert torch.equal(tensor, wanted) and tensor.untyped_storage().nbytes() == 200_000
        assert (data["grid"], data["word"], data["empty"]) == ([(1, 2)], "x", [])
    assert first["crops"] is second["crops"]  # pickled once
    assert made.positional_embed_overrides.embeds.untyped_storage().nbytes() == 200_000
    # Others have the same dict, and the same overrides.
    assert shared["crops"].untyped_storage().nbytes() == overrides.embeds.untyped_storage().nbytes() == 800_000
    assert isinstance(items_of(made)[0].feature, ShmPointerMMData)


def test_lists_of_lists_go_by_no_segment() -> None:
    """The engine looks for pointers in lists only, not in the lists in them."""
    whole = torch.zeros(2, 50_000)
    made = sent(request(an_item(feature=[[whole[0]], [whole[1]]])), offering)
    (first,), (second,) = items_of(made)[0].feature
    assert [tensor.untyped_storage().nbytes() for tensor in (first, second)] == [200_000] * 2
    assert segments() == []


class Odd(list[Any]):
    """A list that is not made of another one."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(parts)


def test_a_list_of_a_kind_of_its_own_becomes_a_list() -> None:
    feature = Odd(torch.ones(2), torch.zeros(2))
    (item,) = items_of(sent(request(an_item(feature=feature)), offering))
    assert type(item.feature) is list and len(item.feature) == 2
    assert [pointer.materialize().tolist() for pointer in item.feature] == [[1.0, 1.0], [0.0, 0.0]]


def test_by_messages_of_types_overrides_stay_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases decode nothing else there, and a scheduler ends of it."""
    environ = ModuleType("sglang.srt.environ")
    vars(environ)["envs"] = SimpleNamespace(SGLANG_USE_PICKLE_IPC=SimpleNamespace(get=lambda: False))
    monkeypatch.setitem(sys.modules, environ.__name__, environ)
    whole = torch.zeros(2, 50_000)
    overrides = SimpleNamespace(embeds=whole[0], positions=[0])
    monkeypatch.setattr(Chain, "offer", lambda *_, **__: (Inline(torch.zeros(1)), b"an invitation"))
    obj = request(an_item(feature=torch.ones(2)), overrides=overrides)
    obj.mm_inputs.mrope_positions = whole[1]
    made = sent(obj, offering)
    for tensor in (made.positional_embed_overrides.embeds, made.mm_inputs.mrope_positions):
        assert isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() == 200_000
    assert isinstance(items_of(made)[0].feature, ShmPointerMMData)


class Lazy:
    """Something that may not be looked into yet."""

    @property
    def shape(self) -> Any:
        raise RuntimeError("not yet")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.ones(1), True),
        ([None, torch.ones(1)], True),
        ([[], [torch.ones(1)]], False),  # of the first part alone: a list may be long
        ([(1, 2)] * 3, False),
        ("text", False),
        ([], False),
        (Lazy(), True),  # without asking it
    ],
)
def test_where_tensors_may_be(value: Any, found: bool) -> None:
    item = an_item(model_specific_data={"it": value})
    assert bool(places(request(item))) is found


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
def test_what_there_is_of_all_items_together_goes_with_them(as_dict: bool) -> None:
    obj = request(an_item(feature=torch.ones(2)), as_dict=as_dict)
    whole = torch.zeros(2, 50_000)
    if as_dict:
        obj.mm_inputs["mrope_positions"] = whole[0]
    else:
        obj.mm_inputs.mrope_positions = whole[0]
    made = sent(obj, offering).mm_inputs
    positions = made["mrope_positions"] if as_dict else made.mrope_positions
    assert positions.untyped_storage().nbytes() == 200_000


def test_where_the_engine_takes_no_pointers_nothing_goes_by_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_takes_pointers(monkeypatch, False)
    whole = torch.zeros(2, 50_000)
    made = sent(request(an_item(feature=whole[0]), an_item(feature=[whole[1]])), offering)
    first, second = (item.feature for item in items_of(made))
    assert [tensor.untyped_storage().nbytes() for tensor in (first, *second)] == [200_000] * 2
    assert segments() == []


def test_the_inputs_of_an_embedding_request_go_by_pointer() -> None:
    """Which have another name up to 0.5.14, and which the engine does not wrap."""
    tensor = torch.ones(2)
    item = an_item(feature=tensor)
    obj = SimpleNamespace(image_inputs={"mm_items": [item]})
    wrap = around_wrap(lambda obj: obj, (offering,))
    made = around_send(lambda self, tokenized_obj: wrap(tokenized_obj), (sending,))(None, obj)
    pointer = made.image_inputs["mm_items"][0].feature
    assert isinstance(pointer, ShmPointerMMData) and torch.equal(pointer.materialize(), tensor)
    assert item.feature is tensor and not hasattr(made, "mm_inputs")


def test_what_was_offered_is_not_offered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no transport carries stays inline, when the engine makes a pointer of it as well."""
    offered = []

    def offer(chain: Chain, tensor: Any, samples: Any = None, *, ranks_agree: bool = True) -> Any:
        offered.append(tensor)
        return Inline(tensor), None

    monkeypatch.setattr(Chain, "offer", offer)
    tensor = torch.ones(2)
    (item,) = items_of(sent(request(an_item(feature=tensor)), offering))
    assert item.feature is tensor and len(offered) == 1


def test_tensors_that_are_not_offered_are_wrapped_by_the_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("mine")

    monkeypatch.setattr("mmlane.engine.requests.own_items", fails)
    (item,) = items_of(sent(request(an_item(feature=torch.ones(2))), offering))
    assert isinstance(item.feature, ShmPointerMMData)
    assert "wrapping failed: OSError: mine" in caplog.text


class Theirs:
    """Another plugin's pointer."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def test_nothing_is_offered_once_another_plugin_has_the_engines_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pickled under that name has to be of that class."""
    monkeypatch.setattr(sys.modules[ShmPointerMMData.__module__], "ShmPointerMMData", Theirs)

    def wrap(obj: Any) -> Any:
        for item in items_of(obj):
            item.feature = Theirs(item.feature)
        return obj

    def send_one_request(self: Any, tokenized_obj: Any) -> Any:
        return around_wrap(wrap, (offering,))(tokenized_obj)

    made = around_send(send_one_request, (sending,))(None, request(an_item(feature=torch.ones(2))))
    pointer = items_of(made)[0].feature
    assert isinstance(pointer, Theirs) and isinstance(pointer.tensor, torch.Tensor)


# --- and compact, where they are sent inline ----------------------------------------------------------------


def pickled(obj: Any) -> int:
    return len(pickle.dumps(obj))


def views(count: int, size: int = 50_000) -> Any:
    """A request of images as the engine splits it, in every place that a tensor can have."""
    whole = torch.arange(float(count * size)).reshape(count, size)
    kinds = [
        lambda part: an_item(feature=part),
        lambda part: an_item(feature=[part]),
        lambda part: an_item(precomputed_embeddings=(part,)),
        lambda part: an_item(model_specific_data={"crops": part}),
    ]
    return request(*(kinds[n % 4](part) for n, part in enumerate(whole)))


def test_views_are_pickled_at_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_takes_pointers(monkeypatch, False)
    obj = views(32)
    payload = 32 * 50_000 * 4
    assert pickled(sent(views(32)).mm_inputs) > 30 * payload  # the fault
    made = sent(obj, compacting)
    assert payload < pickled(made.mm_inputs) < 1.05 * payload
    for old, new in zip(items_of(obj), items_of(pickle.loads(pickle.dumps(made))), strict=False):
        assert str(old) == str(new)


def test_it_is_compacted_once_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_takes_pointers(monkeypatch, False)
    wrap = around_wrap(engines_wrap, (compacting,))
    whole = torch.zeros(2, 50_000)
    item = an_item(feature=whole[0], model_specific_data={"crops": whole[1]})

    async def handle(self: Any, obj: Any) -> Any:
        for _ in range(3):
            yield wrap(request(item))

    async def all_of() -> list[Any]:
        responses = around_samples(handle, (with_samples,))(None, SimpleNamespace(parallel_sample_num=2))
        return [items_of(found)[0] async for found in responses]

    found = asyncio.run(all_of())
    assert (
        len({id(item.feature) for item in found}) == len({id(i.model_specific_data["crops"]) for i in found}) == 1
    )
    assert found[0].feature is not item.feature
    assert item.feature.untyped_storage().nbytes() == 400_000  # whose it is keeps what it had


def test_what_owns_its_storage_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_takes_pointers(monkeypatch, False)
    own = [torch.ones(8), torch.ones(1).expand(8), torch.ones(2).to_sparse(), "x", None]
    obj = request(*(an_item(feature=value) for value in own))
    before = obj.mm_inputs
    assert [item.feature for item in items_of(sent(obj, compacting))] == own and obj.mm_inputs is before


def test_a_request_that_cannot_be_compacted_is_sent_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine_takes_pointers(monkeypatch, False)

    def fails(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("mmlane.transport.compacting.compact", fails)
    whole = torch.zeros(2, 50_000)
    obj = request(an_item(feature=whole[0]))
    assert torch.equal(items_of(sent(obj, compacting))[0].feature, whole[0])
    assert "compacting failed: MemoryError" in caplog.text


# --- batches ------------------------------------------------------------------------------------------------


def batched(is_async: bool, *steps: Any) -> Callable[..., Any]:
    """Sends a batch, and returns what is pickled; fails for a manager that is not None."""

    def send_batch(self: Any, tokenized_objs: Any) -> bytes:
        if self is not None:
            raise OSError("mine")
        return pickle.dumps([vars(obj) for obj in tokenized_objs])

    async def send_async(self: Any, tokenized_objs: Any) -> bytes:
        await asyncio.sleep(0)
        return send_batch(self, tokenized_objs)

    patched = around_send_batch(send_async if is_async else send_batch, steps)

    def called(*args: Any) -> Any:
        result = patched(*args)
        return asyncio.run(result) if is_async else result

    return called


@pytest.mark.parametrize("is_async", [False, True])
def test_the_tensors_of_a_batch_are_offered_too(is_async: bool) -> None:
    called = batched(is_async, offering)
    requests = [request(an_item(feature=torch.full((3,), float(n)))) for n in range(2)]
    received = pickle.loads(called(None, [request(), *requests]))
    features = [sent["mm_inputs"].mm_items[0].feature.materialize() for sent in received[1:]]
    assert [feature.tolist() for feature in features] == [[0.0] * 3, [1.0] * 3]
    with pytest.raises(OSError, match="mine"):
        called("fails", [request(an_item(feature=torch.ones(3))) for _ in range(2)])
    assert segments() == [] and slot.scope.get() is None
    assert pickle.loads(called(None, [request()]))[0]["mm_inputs"] is None


def test_the_views_of_a_batch_are_compacted_and_what_its_requests_share_once() -> None:
    whole = torch.zeros(8, 50_000)
    shared = whole[0]
    requests = [request(overrides=SimpleNamespace(embeds=shared, positions=[0])) for _ in range(8)]
    for steps in ((compacting,), (offering, compacting)):
        message = batched(False, *steps)(None, requests)
        assert 200_000 < len(message) < 210_000
    assert all(obj.positional_embed_overrides.embeds is not shared for obj in requests)


def test_a_coroutine_that_the_loop_closes_in_another_context_ends_well() -> None:
    made: list[Any] = []

    async def send(self: Any, tokenized_obj: Any) -> None:
        made.append(slot.scope.get())
        await asyncio.sleep(0)

    coroutine = around_send(send, (sending,))(Manager(), REQUEST)
    contextvars.copy_context().run(coroutine.send, None)
    coroutine.close()  # raises if it cannot
    assert made[0]._chain is slot.chain and made[0]._made == []


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

"""Python imports this in every process of an engine that bench.engine starts; it notes what calls take.

One JSON object a call, one file a process, in the directory that BENCH_PROBE names. Times are of
CLOCK_MONOTONIC, in seconds. Nothing is replaced before a tokenizer or scheduler is made, so that what is
surrounded is what a plugin has put there.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from functools import wraps
from pathlib import Path
from threading import current_thread, local, main_thread
from time import monotonic, thread_time
from typing import Any

DIRECTORY = "BENCH_PROBE"
# An image of this name stands for an embedding: the number of bytes follows.
EMBEDDING = "mmlane-bench-embedding:"
_HIDDEN = 64  # of the devkit's checkpoints
_FLOAT = 4

_TOKENIZER = "sglang.srt.managers.tokenizer_manager"
_SCHEDULER = "sglang.srt.managers.scheduler"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver"

_done: set[str] = set()


# --- notes ---


class _Pending(local):
    """Of a thread: how many stopwatches run, and notes to be written when none does."""

    running = 0

    def __init__(self) -> None:
        self.notes: list[dict[str, Any]] = []


_pending = _Pending()


class Stopwatch:
    """Time, CPU time and page faults of the calling thread; several stretches add up.

    What is noted while another one runs is written when that has stopped: writing gives up the GIL, and so may
    take longer than what is measured.
    """

    def __init__(self) -> None:
        self.began = monotonic()
        self._took = [0.0, 0.0, 0]

    def __enter__(self) -> Stopwatch:
        _pending.running += 1
        self._since = _now()
        return self

    def __exit__(self, *_: object) -> None:
        steps = zip(self._took, self._since, _now(), strict=True)
        self._took = [took + now - since for took, since, now in steps]
        _pending.running -= 1

    def note(self, what: str, **more: Any) -> None:
        took, cpu, faults = self._took
        _pending.notes.append({"what": what, "began": self.began, "s": took, "cpu": cpu, "faults": faults, **more})
        if not _pending.running:
            _write(_pending.notes)
            _pending.notes.clear()


def _now() -> tuple[float, float, int]:
    from resource import RUSAGE_THREAD, getrusage

    return monotonic(), thread_time(), getrusage(RUSAGE_THREAD).ru_minflt


def _write(notes: list[dict[str, Any]]) -> None:
    with Path(os.environ[DIRECTORY], f"{os.getpid()}.jsonl").open("a") as file:
        file.write("".join(json.dumps(note) + "\n" for note in notes))


def _tensors(request: Any) -> int:
    """Bytes of the tensors in a request's items, or in those of a batch."""
    return sum(value.nbytes for value in _values(request) if hasattr(value, "nbytes"))


def _storage(requests: Any) -> int:
    """Bytes of the storages behind the tensors of requests, each counted once."""
    tensors = [value for request in requests for value in _values(request) if hasattr(value, "untyped_storage")]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _values(request: Any) -> Iterator[Any]:
    for one in getattr(request, "batch", None) or [request]:
        inputs = getattr(one, "mm_inputs", None)
        items = inputs.get("mm_items") if isinstance(inputs, dict) else getattr(inputs, "mm_items", None)
        for item in items or ():
            for name in ("feature", "precomputed_embeddings"):
                value = getattr(item, name, None)
                yield from value if isinstance(value, (list, tuple)) else [value]


# --- the tokenizer ---


def _watch_tokenizer(module: Any) -> None:
    manager = module.TokenizerManager
    module.wrap_shm_features = _wrapping(module.wrap_shm_features)
    manager._send_one_request = _sending(manager._send_one_request)
    manager.generate_request = _with_embedding(manager.generate_request)
    if "mmlane.lane" in sys.modules:
        _watch_lane()


def _watch_lane() -> None:
    from mmlane.lane import Lane, filling
    from mmlane.lane.committing import Committer

    for owner, name, what in (
        (Lane, "put", "put"),
        (Lane, "copy", "put"),
        (Committer, "commit", "commit"),
        (filling, "copy_tensor", "copy"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), what))


def _timed(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with Stopwatch() as watch:
            result = function(*args, **kwargs)
        if current_thread() is main_thread():  # the event loop; not what is committed in the background
            watch.note(what)
        return result

    return timed


def _wrapping(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(wrap)
    def wrap_shm_features(obj: Any) -> Any:
        carried = _tensors(obj)
        with Stopwatch() as watch:
            wrapped = wrap(obj)
        if carried:
            watch.note("wrap", bytes=carried, inline=_tensors(wrapped))
        return wrapped

    return wrap_shm_features


def _sending(send: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(send):

        @wraps(send)
        async def send_async(*args: Any, **kwargs: Any) -> Any:
            watch = Stopwatch()
            try:
                return await _Steps(send(*args, **kwargs), watch)
            finally:
                watch.note("send")

        return send_async

    @wraps(send)
    def send_one_request(*args: Any, **kwargs: Any) -> Any:
        watch = Stopwatch()
        try:
            with watch:
                return send(*args, **kwargs)
        finally:
            watch.note("send")

    return send_one_request


class _Steps:
    """A coroutine whose steps are timed, and what it awaits in between is not."""

    def __init__(self, coroutine: Any, watch: Stopwatch) -> None:
        self._coroutine = coroutine
        self._watch = watch

    def __await__(self) -> Generator[Any, Any, Any]:
        step, value = self._coroutine.send, None
        while True:
            try:
                with self._watch:
                    awaited = step(value)
            except StopIteration as end:
                return end.value
            try:
                step, value = self._coroutine.send, (yield awaited)
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's to see
                step, value = self._coroutine.throw, error


def _with_embedding(generate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(generate)
    def generate_request(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        image = getattr(obj, "image_data", None)
        if isinstance(image, str) and image.startswith(EMBEDDING):
            obj.image_data = [_embedding(int(image.removeprefix(EMBEDDING)))]
        return generate(self, obj, *args, **kwargs)

    return generate_request


def _embedding(nbytes: int) -> dict[str, Any]:
    import torch

    tensor = torch.full((nbytes // _HIDDEN // _FLOAT, _HIDDEN), 0.5)
    tensor[0].random_(1 << 20)  # so that no two have the same hash
    return {"format": "processor_output", "modality": "IMAGE", "precomputed_embeddings": tensor}


# --- a scheduler ---


def _watch_scheduler(module: Any) -> None:
    receiver = sys.modules.get(_RECEIVER)  # from 0.5.13 on
    owner = module.Scheduler if receiver is None else receiver.SchedulerRequestReceiver
    owner.recv_requests = _receiving(owner.recv_requests)


def _receiving(receive: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(receive)
    def recv_requests(*args: Any, **kwargs: Any) -> Any:
        with Stopwatch() as watch:
            received = receive(*args, **kwargs)
        if received:
            from torch.distributed import get_rank

            if carried := sum(map(_tensors, received)):
                held = _storage(received)
                watch.note("recv", rank=get_rank(), bytes=carried, requests=len(received), held=held)
            else:
                watch.note("text", rank=get_rank())
        return received

    return recv_requests


# --- getting there ---


def _at_first_of(owner: Any, watch: Callable[[Any], None]) -> None:
    """Call `watch` when the first object of a class, or of one that derives from it, is made in this process."""
    make, module = owner.__init__, sys.modules[owner.__module__]

    @wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if owner.__name__ not in _done:
            _done.add(owner.__name__)
            watch(module)
        make(self, *args, **kwargs)

    owner.__init__ = init


_WATCHED = {_TOKENIZER: ("TokenizerManager", _watch_tokenizer), _SCHEDULER: ("Scheduler", _watch_scheduler)}


class _Imports:
    """Meta path finder: finds nothing itself, and comes in when one of our modules has been run."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name not in _WATCHED or name in self._searching:
            return None
        import importlib.util

        self._searching.add(name)  # because this asks the meta path too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            owner, watch = _WATCHED[name]
            _at_first_of(getattr(module, owner), watch)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get(DIRECTORY):
    sys.meta_path.insert(0, _Imports())

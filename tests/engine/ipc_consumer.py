"""CUDA IPC without a GPU: the engine's own modules, with a stand-in that records what is done on which device.

    PYTHON_OF_AN_ENGINE ipc_consumer.py [--squat] SCENARIO...

Prints one JSON object: what came of each scenario. `RecordingCuda` takes the place of what torch's CPU build
cannot do, and of nothing else; the memory is the CPU's. Locks, sync buffers and processes are real. Up to 0.5.17 a
rank takes a tensor as the engine does; from 0.5.18 only the opening of its memory is looked at, for what follows
happens on a stream.

The scenarios with a lock write to /tmp: give this a /tmp of its own.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_UN, flock
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
real_empty = torch.empty

PRODUCER, READER = 0, 1
TENSOR = torch.arange(30, dtype=torch.float32).reshape(2, 3, 5)
OFFSET = 256  # of the tensor in its pool
MIB = 1 << 20
WORKERS = (1, 2, 16)
COUNTS = 300
VICTIM = Path("/tmp/victim")
ENGINES_LOCK = Path("/tmp/shm_wr_lock.lock")


class RecordingCuda:
    """A machine with GPUs, as far as memory is passed between them; all tensors are on the CPU.

    `contexts` are the devices on which something was done: a guard, a tensor, or the opening of a handle, which
    torch does under a guard of the device that the handle names first. `opened` are the handles, with the device
    that was current. `unreachable`: pairs of devices without peer access.
    """

    def __init__(self, devices: int = 4, unreachable: Iterable[tuple[int, int]] = ()) -> None:
        self.devices, self.unreachable = devices, set(unreachable)
        self.contexts: set[int] = set()
        self.opened: list[tuple[int | None, tuple[Any, ...]]] = []
        self.asked: list[tuple[int, int]] = []
        self.current: int | None = None
        self.shared: dict[bytes, Any] = {}
        storage: Any = torch.UntypedStorage
        storage._share_cuda_ = lambda this: self.share(this)
        storage._new_shared_cuda = self.open
        cuda: Any = torch.cuda
        cuda.device, cuda.device_count = self.device, lambda: self.devices
        cuda.can_device_access_peer = self.can_access
        torch.empty = self.empty

    def share(self, storage: Any) -> tuple[Any, ...]:
        """A handle in torch's form: device, handle, size, offset, and what keeps it alive."""
        name = len(self.shared).to_bytes(8, "little")
        self.shared[name] = storage
        return (PRODUCER, name, storage.nbytes(), 0, b"counter", 0, b"event", True)

    def open(self, device: int, handle: bytes, *rest: Any) -> Any:
        self.contexts.add(device)
        self.opened.append((self.current, (device, handle, *rest)))
        if handle not in self.shared:
            raise RuntimeError("CUDA error: invalid resource handle")
        return self.shared[handle]

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, torch.device(device).index
        assert self.current is not None
        self.contexts.add(self.current)
        yield
        self.current = before

    def can_access(self, device: int, peer: int) -> bool:
        self.asked.append((device, peer))
        return (device, peer) not in self.unreachable

    def empty(self, *size: Any, device: Any = None, **options: Any) -> Any:
        """A pool is only measured: it takes no memory."""
        if device is None or torch.device(device).type != "cuda":
            return real_empty(*size, device=device, **options)
        index = torch.device(device).index
        if index is not None:
            self.contexts.add(index)
        made = real_empty(*size, device="meta", **options)
        return made if made.numel() >= MIB else real_empty(*size, **options)


class Said(logging.Handler):
    """What mmlane and the engine's transport put in the log, as LEVEL: TEXT."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger().addHandler(self)
        logging.getLogger("mmlane").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "mmlane" or record.name.endswith(("cuda_ipc", "cuda_ipc_transport_utils")):
            self.lines.append(f"{record.levelname}: {record.getMessage()}")

    def warnings(self) -> list[str]:
        return [line for line in self.lines if line.startswith("WARNING")]


def transport() -> Any:
    """The engine's module."""
    from sglang.srt.utils import cuda_ipc_transport_utils as older

    if hasattr(older, "ShmSyncBuffer"):
        return older
    from sglang.srt.multimodal.transport import cuda_ipc

    return cuda_ipc


# --- a rank takes a tensor -----------------------------------------------------------------------------------


def shared_tensor(cuda: RecordingCuda, pooled: bool, sync: Any = None) -> Any:
    """A proxy of TENSOR as a rank has got it."""
    module = transport()
    proxy_class = module.CudaIpcTensorTransportProxy
    data = TENSOR.contiguous().view(torch.int8).view(-1)
    pool = torch.zeros(OFFSET + data.numel(), dtype=torch.int8)
    pool[OFFSET:] = data
    options = {
        "data": data if pooled else pool[OFFSET:],
        "info_data": TENSOR,
        "sync_buffer_meta": sync and sync.meta_data,
        "pool_ipc_handle": cuda.share(pool.untyped_storage()) if pooled else None,
        "pool_byte_offset": OFFSET,
        "pool_device_index": PRODUCER,
        **dict.fromkeys(("ready_byte_offset", "ack_byte_offset", "generation"), 0),
        "total_consumer_count": 1,
        "use_pool_handle_cache": True,
    }
    known = inspect.signature(proxy_class).parameters
    proxy = proxy_class(**{name: value for name, value in options.items() if name in known})
    extra = proxy.proxy_state["ipc_extra"]
    if not pooled:
        extra["device_index"] = PRODUCER  # the tensor was on the CPU
    return pickle.loads(pickle.dumps(proxy))


def taken(proxy: Any, device: int) -> bool:
    """Whether this rank gets the right tensor; from 0.5.18, whether it opens the right memory."""
    if hasattr(proxy, "_open_pool_slice"):
        opened, _ = proxy._open_pool_slice(device)
        return torch.equal(opened.view(torch.float32).view(TENSOR.shape), TENSOR)
    return torch.equal(proxy.reconstruct_on_target_device(device), TENSOR)


def told(cuda: RecordingCuda) -> dict[str, Any]:
    """Where things were done, and under which device each handle was opened: the current and the handle's own."""
    return {
        "contexts": sorted(cuda.contexts),
        "opened": [[current, handle[0]] for current, handle in cuda.opened],
    }


def take(pooled: bool, device: int = READER) -> dict[str, Any]:
    cuda, sync = RecordingCuda(), sync_buffer()
    proxy = shared_tensor(cuda, pooled, sync)
    before = pickle.dumps(proxy.proxy_state)
    right = taken(proxy, device)
    keys = [key[0] for key in getattr(transport(), "_pool_storage_cache", {})]
    restored = pickle.dumps(proxy.proxy_state) == before
    return {**told(cuda), "right": right, "keys": keys, "restored": restored, "counted": counted(sync)}


def stale() -> dict[str, Any]:
    """Three tensors of one pool. Before the third, what the cache holds goes bad: it is opened anew."""
    cuda = RecordingCuda()
    wire = pickle.dumps(shared_tensor(cuda, True, sync_buffer()))
    cache = transport()._pool_storage_cache
    right = [taken(pickle.loads(wire), READER) for _ in range(2)]
    (key,) = cache
    storage, cache[key] = cache[key], object()  # which has no bytes
    right.append(taken(pickle.loads(wire), READER))
    return {**told(cuda), "right": right, "keys": [key[0] for key in cache], "mended": cache[key] is storage}


def unreachable() -> dict[str, Any]:
    """Two tensors for a device without peer access, one for another such device, one for a device with it."""
    said = Said()
    cuda = RecordingCuda(devices=8, unreachable=[(5, PRODUCER), (6, PRODUCER)])
    right = [taken(shared_tensor(cuda, False, sync_buffer()), device) for device in (5, 5, 6, 7)]
    return {**told(cuda), "right": right, "said": said.warnings(), "asked": cuda.asked}


def unseen() -> dict[str, Any]:
    """The rank sees one GPU, which it calls 0, and the producer's is not it."""
    cuda = RecordingCuda(devices=1)
    proxy = shared_tensor(cuda, False, sync_buffer())
    extra = proxy.proxy_state["ipc_extra"]
    extra["handle"], extra["device_index"] = (3, *extra["handle"][1:]), 3
    return {"right": taken(proxy, 0), "asked": cuda.asked, **told(cuda)}


def failing() -> dict[str, Any]:
    """The producer's memory is gone."""
    cuda = RecordingCuda()
    proxy = shared_tensor(cuda, False)
    cuda.shared.clear()
    before = pickle.dumps(proxy.proxy_state)
    try:
        error = str(taken(proxy, READER))
    except RuntimeError as raised:
        error = str(raised)
    return {"error": error, "restored": pickle.dumps(proxy.proxy_state) == before}


class Moved(torch.Tensor):
    """Says that it is on the GPU now."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


def by_value() -> dict[str, Any]:
    """No handle could be made: the tensor itself travels."""
    proxy = shared_tensor(RecordingCuda(), False)
    proxy.proxy_state = {"ipc_extra": None, "tensor_data": TENSOR.as_subclass(Moved)}
    return {"right": taken(proxy, READER)}


# --- pools ---------------------------------------------------------------------------------------------------


@contextmanager
def processor(workers: int) -> Iterator[Any]:
    """The engine's multimodal processor, as each of so many tokenizer workers makes one."""
    RecordingCuda()
    from sglang.srt import server_args
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    class Processor(BaseMultimodalProcessor):  # type: ignore[misc]
        async def process_mm_data_async(self, *args: Any, **kwargs: Any) -> None: ...

    class Words:
        def encode(self, text: str) -> list[int]:
            return []

    arguments = object.__new__(server_args.ServerArgs)  # which has its defaults, and looks at no model
    chosen = {"tokenizer_worker_num": workers, "mm_process_config": {}, "mm_feature_transport": "cuda_ipc"}
    for name, value in {**chosen, "tp_size": 2}.items():
        setattr(arguments, name, value)
    publish = getattr(server_args, "set_global_server_args_for_tokenizer", None)
    if publish is not None:
        publish(arguments)
    made: Any = Processor(None, arguments, Words(), "default")
    yield made
    made.cudaipc_mmfeature_pool.shutdown()


def pools() -> dict[str, Any]:
    """How much each of several workers takes, in MiB."""
    found: dict[str, Any] = {}
    for workers in WORKERS:
        said = Said()
        with processor(workers) as made:
            found[str(workers)] = made.cudaipc_mmfeature_pool.memory_pool.numel() / MIB
        found["said"] = [line for line in said.lines if "mmlane" in line]
    return found


def overflow() -> dict[str, Any]:
    """Three features that are too large for each of two pools."""
    said = Said()
    answers = []
    for _ in range(2):
        with processor(1) as made:
            pool = made.cudaipc_mmfeature_pool
            large = real_empty(pool.memory_pool.numel() // 4 + 1, dtype=torch.float32, device="meta")
            small = real_empty(100, dtype=torch.float32)
            answers += [pool.return_a_slice_tensor_with_flag(large)[0] for _ in range(3)]
            fits = pool.return_a_slice_tensor_with_flag(small)[0] is not None
    return {"refused": answers.count(None), "fits": fits, "said": said.warnings()}


# --- the lock ------------------------------------------------------------------------------------------------


_buffers: list[Any] = []  # each is unlinked with its object


def sync_buffer() -> Any:
    """Where ranks count in for one tensor; None from 0.5.18 on."""
    if hasattr(transport(), "ShmSyncBuffer"):
        _buffers.append(transport().ShmSyncBuffer())
    return _buffers[-1] if _buffers else None


def counted(sync: Any) -> float | None:
    """How many ranks have counted in."""
    return sync and float(sync.buffer_wrapper.item())


def link() -> dict[str, Any]:
    """Another user has linked the engine's path to a file of ours."""
    VICTIM.write_text("precious")
    ENGINES_LOCK.unlink(missing_ok=True)
    ENGINES_LOCK.symlink_to(VICTIM)
    sync = sync_buffer()
    right = taken(shared_tensor(RecordingCuda(), False, sync), READER)
    ENGINES_LOCK.unlink()
    lock = os.fspath(transport().SHM_LOCK_FILE)
    return {"victim": VICTIM.read_text(), "lock": lock, "right": right, "counted": counted(sync)}


def exclusion() -> dict[str, Any]:
    """Two ranks count in, again and again; at first both have to wait, for the lock is ours."""
    sync = sync_buffer()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=count_in, args=(sync,)) for _ in range(2)]
    path = os.fspath(transport().SHM_LOCK_FILE)
    with open(path, "w") as held:  # noqa: PTH123 - as the engine does
        flock(held, LOCK_EX)
        for rank in ranks:
            rank.start()
        wait_for(lambda: {rank.pid for rank in ranks} <= waiting())
        meanwhile = counted(sync)
        flock(held, LOCK_UN)
    for rank in ranks:
        rank.join(60)
    return {"counted before": meanwhile, "counted": counted(sync), "exits": [rank.exitcode for rank in ranks]}


def count_in(sync: Any) -> None:
    cuda = RecordingCuda()
    for _ in range(COUNTS):
        assert taken(shared_tensor(cuda, False, sync), READER)


def waiting() -> set[int]:
    """The processes that wait for a lock."""
    waits = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return {int(words[words.index("WRITE") + 1]) for words in waits if "WRITE" in words}


def wait_for(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        os.sched_yield()


def others_file() -> dict[str, Any]:
    """The engine's path is another user's file, and we are not root."""
    ENGINES_LOCK.unlink(missing_ok=True)
    ENGINES_LOCK.touch(mode=0o644)
    os.chown(ENGINES_LOCK, 12345, 12345)
    sync = sync_buffer()
    lock = Path(os.fspath(transport().SHM_LOCK_FILE))
    ours = [Path("/dev/shm", sync.buffer.name)]
    if lock != ENGINES_LOCK:
        lock.unlink(missing_ok=True)
        ours.append(lock.parent)
    for path in ours:
        os.chown(path, 54321, 54321)  # as if this user had started the engine
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(54321)
            answer = str(taken(shared_tensor(RecordingCuda(), False, sync), READER))
        except OSError as error:
            answer = f"{type(error).__name__}: {error.filename}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as said:
        answer = said.read()
    return {"answer": answer, "counted": counted(sync)}


def squat() -> None:
    """Another user has been here first, with a directory of the name that ours has."""
    theirs = Path(f"/tmp/mmlane-{os.geteuid()}")
    theirs.mkdir()
    theirs.chmod(0o777)
    os.chown(theirs, 12345, -1)
    Path("/tmp/home").mkdir()


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "pooled": lambda: take(True),
    "unpooled": lambda: take(False),
    "same-device": lambda: take(False, PRODUCER),
    "stale": stale,
    "unreachable": unreachable,
    "unseen": unseen,
    "failing": failing,
    "by-value": by_value,
    "pools": pools,
    "overflow": overflow,
    "link": link,
    "exclusion": exclusion,
    "others-file": others_file,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--squat", action="store_true")
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    chosen = parser.parse_args()
    if chosen.squat:
        squat()
    found = {}
    for name in chosen.scenarios:
        getattr(transport(), "_pool_handle_cache_clear", lambda: None)()
        found[name] = SCENARIOS[name]()
        _buffers.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

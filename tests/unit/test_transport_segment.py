"""Segments in real processes: every tensor arrives, nothing stays in /dev/shm, no process is killed.

Also as the engine sees one, inside of a pointer, where there is no lane.
"""

from __future__ import annotations

import errno
import gc
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mmlane.host import OUR_PREFIX, SHM  # noqa: E402
from mmlane.transport.base import Here, LostFeature, Ownership  # noqa: E402
from mmlane.transport.pointer import ShmPointerMMData  # noqa: E402
from mmlane.transport.segment import Segment, SegmentTransport  # noqa: E402
from mmlane.transport.segment_memory import NotTransportable, plain_bytes  # noqa: E402
from tests.lane.harness.child import run  # noqa: E402
from tests.unit.launches import without_a_side  # noqa: E402

QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)} - QUANTIZED, key=str)


def segments() -> set[str]:
    """The segments of this process: others on this machine run engines too."""
    return {file.name for file in SHM.glob(f"{OUR_PREFIX}{os.getpid()}_*")}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    if segments():
        gc.collect()
    assert segments() == set()


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's module, where pickle looks for the class, and a process that has no lane."""
    without_a_side(monkeypatch)


def sent(value: Segment) -> bytes:
    """What travels."""
    return pickle.dumps(value.state())


def received(message: bytes) -> Segment:
    """What arrives."""
    payload = SegmentTransport(Here()).receive(pickle.loads(message))
    assert isinstance(payload, Segment)
    return payload


def handed_on(value: Segment) -> Segment:
    return received(sent(value))


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def random_bytes(nbytes: int, seed: int = 0) -> Any:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- every tensor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape(dtype: Any, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    raw = random_bytes(count * dtype.itemsize)
    if dtype is torch.bool:
        raw %= 2
    try:
        tensor = raw.view(dtype).reshape(shape)
    except RuntimeError as error:
        pytest.skip(f"torch cannot make one: {error}")
    pointer = through_pickle(ShmPointerMMData(tensor, precomputed_hash=7))
    assert (pointer.shape, pointer.dtype, pointer.precomputed_hash) == (tensor.shape, dtype, 7)
    result = pointer.materialize()
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(plain_bytes(result), raw)


@st.composite
def strided(draw: st.DrawFn) -> Any:
    """A view into some tensor, with any strides: steps, transpositions, broadcasts, offsets, conjugates."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    tensor = random_bytes(torch.Size(shape).numel() * dtype.itemsize, draw(st.integers(0, 99))).view(dtype)
    tensor = tensor.reshape(shape)
    for dim in range(tensor.dim()):
        step = draw(st.integers(1, 3))
        start = draw(st.integers(0, tensor.shape[dim]))
        tensor = tensor.narrow(dim, start, tensor.shape[dim] - start)
        tensor = tensor[tuple([slice(None)] * dim + [slice(None, None, step)])]
    tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(0, 3)), *tensor.shape)
    return tensor.conj() if dtype is torch.complex64 and draw(st.booleans()) else tensor


@given(strided(), st.integers(1, 4))
def test_any_strides_and_any_number_of_round_trips(tensor: Any, trips: int) -> None:
    travelling = Segment.holding(tensor)
    for _ in range(trips):
        travelling = handed_on(travelling)
    result = travelling.take()
    assert result.shape == tensor.shape
    assert torch.equal(plain_bytes(result), plain_bytes(tensor))
    assert segments() == set()


def test_a_parameter_arrives_as_a_plain_tensor() -> None:
    tensor = torch.nn.Parameter(torch.arange(3.0))
    result = handed_on(Segment.holding(tensor)).take()
    assert type(result) is torch.Tensor and not result.requires_grad
    assert torch.equal(result, tensor.detach())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        lambda: torch.zeros(3, device="meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
def test_what_is_more_than_its_bytes_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(NotTransportable, match="wanted a dense tensor"):
        Segment.holding(make())


def test_only_metadata_travels() -> None:
    value: Any = ShmPointerMMData(torch.zeros(1 << 20))
    assert set(value.__getstate__()) == {"shm_name", "shape", "dtype", "precomputed_hash"}
    assert len(pickle.dumps(value)) < 500
    through_pickle(value).materialize()


# --- processes ----------------------------------------------------------------------------------------------


def _sum_and_scribble(message: bytes) -> float:
    tensor = received(message).take()
    total = float(tensor.sum())
    tensor.zero_()
    return total


def test_a_reader_in_another_process() -> None:
    assert run(_sum_and_scribble, sent(Segment.holding(torch.full((1000,), 2.0)))) == 2000.0
    assert segments() == set()


def _drop(message: bytes) -> bool:
    arrived = received(message)
    file = SHM / arrived.name
    there_before = file.exists()
    del arrived
    return there_before and not file.exists()


def test_a_reader_that_drops_it_unread_removes_it() -> None:
    assert run(_drop, sent(Segment.holding(torch.zeros(9))))


def _pass_on(message: bytes) -> bytes:
    return sent(received(message))


def test_a_relay_that_drops_what_it_passed_on_leaves_it() -> None:
    arrived = received(run(_pass_on, sent(Segment.holding(torch.arange(3)))))
    assert arrived.take().tolist() == [0, 1, 2]


def test_what_a_reader_writes_stays_with_it() -> None:
    value = Segment.holding(torch.arange(5.0))
    readers = [handed_on(value), handed_on(value)]
    assert [reader.prepare() for reader in readers] == [None, None]
    first, second = (reader.take() for reader in readers)
    first.fill_(-1)
    assert second.tolist() == [0, 1, 2, 3, 4]


def test_the_memory_lives_as_long_as_a_view_of_it() -> None:
    view = handed_on(Segment.holding(torch.arange(6.0))).take()[2:].reshape(2, 2)
    gc.collect()
    assert view.tolist() == [[2, 3], [4, 5]]


def test_no_descriptor_is_left_open() -> None:
    before = open_descriptors()
    for _ in range(20):
        handed_on(Segment.holding(torch.arange(6.0))).take()
    gc.collect()
    assert open_descriptors() == before


def test_a_forked_child_leaves_the_parents_segment_alone() -> None:
    value = Segment.holding(torch.arange(4.0))
    pid = os.fork()
    if pid == 0:
        del value
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert handed_on(value).take().tolist() == [0, 1, 2, 3]


# --- errors -------------------------------------------------------------------------------------------------


def test_a_lost_segment_is_an_error_only_when_it_is_taken() -> None:
    value = Segment.holding(torch.zeros(4))
    (SHM / value.name).unlink()
    arrived = handed_on(value)
    assert arrived.peek() is None
    with pytest.raises(LostFeature, match=f"{value.name}.*FileNotFoundError.*send it again"):
        arrived.take()
    arrived.release()


def test_an_open_segment_outlives_its_name() -> None:
    arrived = handed_on(Segment.holding(torch.arange(4.0)))
    (SHM / arrived.name).unlink()
    assert arrived.take().tolist() == [0, 1, 2, 3]


def test_taking_twice_is_an_error() -> None:
    arrived = handed_on(Segment.holding(torch.zeros(4)))
    arrived.take()
    with pytest.raises(LostFeature, match="already taken"):
        arrived.take()


def test_a_segment_may_be_released_more_than_once() -> None:
    arrived = handed_on(Segment.holding(torch.zeros(4)))
    for _ in range(2):
        arrived.release()
        assert arrived.ownership is Ownership.DONE and segments() == set()


@pytest.mark.parametrize(
    "change",
    [{"shape": (1 << 20,)}, {"shape": (-1,)}, {"dtype": "float32"}, {"shm_name": "no/such"}, {"shape": None}],
    ids=str,
)
def test_a_malformed_state_never_raises_while_unpickling(change: dict[str, Any]) -> None:
    value: Any = ShmPointerMMData(torch.zeros(4))
    arrived = ShmPointerMMData.__new__(ShmPointerMMData)
    arrived.__setstate__({**value.__getstate__(), **change})
    with pytest.raises(LostFeature):
        arrived.materialize()
    value.close_and_unlink()


def test_an_empty_state_never_raises_while_unpickling() -> None:
    arrived = ShmPointerMMData.__new__(ShmPointerMMData)
    arrived.__setstate__({})
    with pytest.raises(LostFeature, match="KeyError"):
        arrived.materialize()


def test_the_states_of_every_engine_version_are_understood() -> None:
    """Versions below 0.5.14 have no hash; the Rust server makes stubs with a name of its own and a plain tuple."""
    foreign = SharedMemory(create=True, size=8, name=f"{OUR_PREFIX}{os.getpid()}_foreign")
    assert foreign.buf is not None
    foreign.buf[:8] = bytes(8)
    foreign.close()
    arrived = ShmPointerMMData.__new__(ShmPointerMMData)
    arrived.__setstate__({"shm_name": foreign.name, "shape": (1, 2), "dtype": torch.float32})
    assert arrived.precomputed_hash is None
    assert arrived.materialize().tolist() == [[0, 0]]


def test_a_segment_that_is_never_sent_is_removed_with_its_object() -> None:
    value = Segment.holding(torch.zeros(4))
    assert segments() == {value.name}
    del value
    assert segments() == set()


def test_a_segment_is_removed_with_the_pointer_that_holds_it() -> None:
    value = ShmPointerMMData(torch.zeros(4))
    assert segments() == {value.payload.name}
    del value
    assert segments() == set()


@pytest.mark.parametrize("broken", ["posix_fallocate", "copy"])
def test_a_failing_creation_leaves_nothing(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "made to fail")

    if broken == "copy":
        monkeypatch.setattr(torch, "frombuffer", fail)
    else:
        monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="made to fail"):
        Segment.holding(torch.zeros(4))
    assert segments() == set()


# --- the class as the engine sees it ------------------------------------------------------------------------


def test_the_engine_and_its_codec_recognize_the_class() -> None:
    assert ShmPointerMMData.__name__ == ShmPointerMMData.__qualname__ == "ShmPointerMMData"
    assert ShmPointerMMData.__module__ == "sglang.srt.managers.mm_utils"
    engine_class: Any = ShmPointerMMData
    assert isinstance(engine_class.__new__(engine_class), ShmPointerMMData)
    value = engine_class(torch.ones(2), precomputed_hash=3)
    assert isinstance(value, ShmPointerMMData) and value.precomputed_hash == 3


def test_what_cannot_travel_by_pointer_stays_a_tensor(caplog: pytest.LogCaptureFixture) -> None:
    tensor = torch.zeros(3, 3).to_sparse()
    with caplog.at_level("WARNING", logger="mmlane"):
        made = [ShmPointerMMData(tensor) for _ in range(2)]
    assert all(value is tensor for value in made)
    (record,) = caplog.records
    assert "inline" in record.message and "sparse" in record.message


# --- a full /dev/shm ----------------------------------------------------------------------------------------

FULL = """
    import logging, os, pickle, sys, torch
    logging.basicConfig()
    from mmlane.transport.pointer import ShmPointerMMData
    from mmlane.transport.segment import Segment
    fits = Segment.holding(torch.zeros(1 << 18))
    try:
        Segment.holding(torch.zeros(1 << 20))
    except OSError as error:
        print("refused", error.errno, error.strerror)
    assert os.listdir("/dev/shm") == [fits.name], os.listdir("/dev/shm")
    tensor = torch.zeros(1 << 20)
    assert ShmPointerMMData(tensor) is tensor and ShmPointerMMData(tensor) is tensor
    del fits
    assert os.listdir("/dev/shm") == []
    print("lives")
"""

WITHOUT_RESERVING = """
    import os
    del os.posix_fallocate
    import torch
    from mmlane.transport.segment import Segment
    Segment.holding(torch.zeros(1 << 20))
"""


def in_small_shm(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a /dev/shm of 2 MiB, in a mount namespace of its own."""
    small = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", small, "sh", sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


MOUNTS = subprocess.run(
    ["unshare", "-m", "mount", "-t", "tmpfs", "x", "/dev/shm"], capture_output=True, check=False
)
needs_mounts = pytest.mark.skipif(
    MOUNTS.returncode != 0, reason="no right to mount a small /dev/shm here (needs root)"
)


@needs_mounts
def test_a_full_shm_is_an_error_and_the_tensor_goes_inline() -> None:
    run = in_small_shm(FULL)
    assert run.returncode == 0, run.stderr
    refused, lives = run.stdout.splitlines()
    assert refused.startswith(f"refused {errno.ENOSPC} wanted 4.0 MiB in /dev/shm, found 1.0 MiB free of 2.0 MiB")
    assert "--shm-size" in refused and lives == "lives"
    assert run.stderr.count("The feature is sent inline") == 1


@needs_mounts
def test_without_reserving_a_full_shm_kills_the_process() -> None:
    """What the test above guards against does happen here."""
    run = in_small_shm(WITHOUT_RESERVING)
    assert run.returncode == -7, (run.returncode, run.stderr)  # SIGBUS


DROPPED = """
    import gc, pickle, torch
    from multiprocessing import resource_tracker
    from mmlane.transport.pointer import ShmPointerMMData
    from mmlane.host import SHM
    from mmlane.transport.segment import Segment

    sent = ShmPointerMMData(torch.ones(4))
    cycle = [ShmPointerMMData(torch.ones(4)), ShmPointerMMData()]
    cycle[1].__setstate__(pickle.loads(pickle.dumps(sent.__getstate__())))
    names = [pointer.payload.name for pointer in cycle]
    cycle.append(cycle)
    with resource_tracker._resource_tracker._lock:
        del cycle
        gc.collect()
    assert not any((SHM / name).exists() for name in names)
    Segment.holding(torch.ones(4)).release()
"""


def test_a_pointer_may_be_collected_while_the_resource_tracker_is_busy() -> None:
    """The collector runs where it likes: also where this thread holds the lock that removing a segment takes."""
    command = [sys.executable, "-c", textwrap.dedent(DROPPED)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert "resource_tracker" not in run.stderr  # it has nothing to complain of either

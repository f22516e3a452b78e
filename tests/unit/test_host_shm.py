"""Segments in the real /dev/shm, and what their names tell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmlane import host
from mmlane.host import proc


@pytest.fixture
def segment() -> Iterator[Callable[[str, int], Path]]:
    """Makes files in the real /dev/shm and deletes them afterwards."""
    made: list[Path] = []

    def make(name: str, size: int) -> Path:
        file = host.SHM / name
        assert not file.exists()
        made.append(file)
        file.write_bytes(b"x" * size)
        return file

    yield make
    for file in made:
        file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def our_name(pid: int, started: int | None = None, namespace: int | None = None) -> str:
    """The name that our pointer gives a segment of a process, by default of one that runs here."""
    if started is None:
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    if namespace is None:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"mmlane_{pid}_{started}_{namespace}_{os.urandom(8).hex()}"


def test_segments_of_every_kind_are_listed_and_others_are_not(
    segment: Callable[[str, int], Path], dead_pid: int
) -> None:
    suffix = os.urandom(4).hex()
    ours = segment(our_name(os.getpid()), 5000)
    alive = segment(f"sgl_shm_mm_{os.getpid()}_{suffix}", 100)
    dead = segment(f"sgl_shm_mm_{dead_pid}_{suffix}", 70000)
    python = segment(f"psm_{suffix}", 4096)
    stranger = segment(f"stranger_{suffix}", 10)

    shm = host.shared_memory()
    assert shm is not None and shm.writable and 0 < shm.free < shm.total
    found = {s.name: s for s in shm.segments}
    assert stranger.name not in found
    assert found[ours.name] == host.Segment(ours.name, "mmlane", 8192, os.getpid(), True)
    assert found[alive.name] == host.Segment(alive.name, "engine", 4096, os.getpid(), True)
    assert found[dead.name] == host.Segment(dead.name, "engine", 73728, dead_pid, False)
    assert found[python.name] == host.Segment(python.name, "python", 4096, None, None)
    assert found[dead.name] in shm.abandoned()
    assert not {found[ours.name], found[alive.name], found[python.name]} & set(shm.abandoned())


def test_our_names_tell_the_maker_for_certain(dead_pid: int) -> None:
    here = os.getpid()
    assert host.maker(our_name(here)) == (here, True)
    assert host.maker(our_name(here, started=1)) == (here, False)  # the number was given to another process
    assert host.maker(our_name(dead_pid, started=1)) == (dead_pid, False)
    assert host.maker(our_name(here, namespace=1)) == (here, None)  # a container's: cannot be known from here


def test_where_our_own_pid_namespace_is_hidden_no_maker_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "pid_namespace", lambda: None)
    assert host.maker(our_name(os.getpid())) == (os.getpid(), None)


def test_a_new_name_tells_that_this_process_has_made_it() -> None:
    name = host.new_segment_name()
    assert host.maker(name) == (os.getpid(), True)
    assert name != host.new_segment_name() and len(name) <= 250
    started, namespace = host.process(os.getpid()), host.pid_namespace()
    assert started is not None and namespace is not None
    assert host.parse_segment_name(name) == host.SegmentName("mmlane", os.getpid(), started.started, namespace)


@pytest.mark.parametrize(
    ("name", "pid"),
    [
        ("sgl_shm_mm_1_0a1b2c3d", 1),
        ("sgl_shm_nodecheck_1_0a1b2c3d", 1),
        ("sgl_shm_some_kind_1_0a1b2c3d", None),
        ("sgl_shm_mm_1_0a1b2c3d4e", None),
        ("sgl_shm_mm_99999999999999999999_0a1b2c3d", 99999999999999999999),
        ("sgl_shm_mm_0_0a1b2c3d", None),
        ("sgl_shm_mm", None),
        ("psm_12345678", None),
        ("mmlane_something", None),
        ("mmlane_0_1_2_0123456789abcdef", None),
        ("mmlane_1_1_2_0a", None),
    ],
)
def test_pids_in_names(name: str, pid: int | None) -> None:
    found, alive = host.maker(name)
    assert found == pid
    assert alive is (None if pid is None else pid == 1)


def test_only_plain_files_are_segments(tmp_path: Path) -> None:
    """Any user can put these into /dev/shm."""
    (tmp_path / "psm_a").write_bytes(b"x")
    (tmp_path / "psm_loop").symlink_to("psm_loop")
    (tmp_path / "psm_link").symlink_to("psm_a")
    (tmp_path / "psm_directory").mkdir()
    os.mkfifo(tmp_path / "psm_fifo")
    shm = host.shared_memory(tmp_path)
    assert shm is not None and [segment.name for segment in shm.segments] == ["psm_a"]


def test_without_a_dev_shm(tmp_path: Path) -> None:
    assert host.shared_memory(tmp_path / "missing") is None


def test_a_file_is_no_shared_memory_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert host.shared_memory(tmp_path / "file") is None


def test_a_directory_that_may_not_be_listed_still_has_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> Iterator[Path]:
        raise PermissionError

    (tmp_path / "psm_a").touch()
    monkeypatch.setattr(Path, "iterdir", refuse)
    shm = host.shared_memory(tmp_path)
    assert shm is not None and shm.segments == () and not shm.read_only
    assert 0 < shm.free <= shm.total
    assert host.room(tmp_path)[1] == shm.total


def test_what_vanishes_or_cannot_be_looked_at_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> os.stat_result:
        raise OSError

    (tmp_path / "psm_a").touch()
    monkeypatch.setattr(Path, "lstat", refuse)
    shm = host.shared_memory(tmp_path)
    assert shm is not None and shm.segments == ()


def test_there_is_no_room_where_there_is_no_dev_shm(tmp_path: Path) -> None:
    assert host.room(tmp_path / "missing") == (0, 0)

"""What /proc says of processes and mounts, whatever is in its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given

from mmlane import host
from tests.unit.kernel_files import FILES


@pytest.fixture(scope="module")
def anything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anything")


@given(FILES)
@example(b"")
@example(b"7 (a) b) S 1 2")
@example(b"7 (a) S " + b"9" * 5000 + b" x" * 40)
@example(b"7 (a) S" + b" \xc2\xb2" * 40)
def test_any_content_of_a_stat_file_is_read_or_counts_as_unknown(anything: Path, content: bytes) -> None:
    (anything / "7").mkdir(exist_ok=True)
    (anything / "7" / "stat").write_bytes(content)
    assert isinstance(host.process(7, anything), (host.Process, type(None)))


def test_a_process_with_any_name(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = " ".join(str(number) for number in range(4, 53))
    (tmp_path / "7" / "stat").write_text(f"7 (a) R (b) S {fields}\n")
    assert host.process(7, tmp_path) == host.Process("a) R (b", "S", 22)
    assert host.process(8, tmp_path) is None


def test_mounts_as_the_kernel_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_bytes(
        b"30 20 0:26 / /a\\040b rw,nosuid - tmpfs  rw,size=1k\n"  # without a source
        b"31 20 0:27 /in /c\\134040 rw shared:1 master:2 - ext4 /dev/a\\011b rw\n"
        b"32 20 0:28 / - rw - proc proc rw\n"  # mounted on a directory of this name
        b"33 20 0:29 / /\xff\x85\x0c rw - tmpfs x rw\n"  # what Python takes for the end of a line is none
        b"34 20 0:30 / /short rw - tmpfs\n"
        b"nonsense\n"
        b"\n"
    )
    assert host.mounts(file) == (
        host.Mount("0:26", "/", "/a b", "tmpfs", "rw,size=1k"),
        host.Mount("0:27", "/in", "/c\\040", "ext4", "rw"),
        host.Mount("0:28", "/", "-", "proc", "rw"),
        host.Mount("0:29", "/", os.fsdecode(b"/\xff\x85\x0c"), "tmpfs", "rw"),
    )
    assert host.mounts(tmp_path / "missing") == ()


@pytest.mark.parametrize(
    ("status", "numbers"),
    [
        (b"Name:\tx\nUid:\t1\t22\n", [1, 22]),
        (b"Uid:\tme\n", []),
        (b"Uid:\t1 me\n", []),
        (b"Uid: " + b"9" * 5000, []),
        (b"Uid:\xff", []),
        (b"", []),
        (None, []),
    ],
)
def test_the_numbers_in_a_status(tmp_path: Path, status: bytes | None, numbers: list[int]) -> None:
    (tmp_path / "7").mkdir()
    if status is not None:
        (tmp_path / "7" / "status").write_bytes(status)
    assert host.status_numbers(7, "Uid", tmp_path) == numbers


@given(FILES)
def test_a_command_line_is_one_printable_line_whatever_is_in_its_file(anything: Path, content: bytes) -> None:
    (anything / "7").mkdir(exist_ok=True)
    (anything / "7" / "cmdline").write_bytes(content)
    assert host.command_line(7, anything).isprintable()


def test_a_process_that_has_ended(tmp_path: Path) -> None:
    """Nothing is known of it, and that is no error."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = process.pid
    assert not host.is_alive(gone)
    assert host.process(gone) is None
    assert host.command_line(gone) == ""
    assert host.has_mapped(gone, b"python") is False
    assert host.status_numbers(gone, "Uid") == []


def test_this_process() -> None:
    me = os.getpid()
    assert host.is_alive(me) and me in (host.pids() or [])
    assert host.has_mapped(me, b"python") is True
    assert host.has_mapped(me, b"no such library") is False
    assert host.status_numbers(me, "Uid")[1] == host.status_numbers("self", "Uid")[1] == os.geteuid()
    assert "python" in host.command_line(me)


@pytest.mark.parametrize("pid", [1 << 40, 1 << 80])
def test_a_pid_beyond_the_kernels_range_is_not_alive(pid: int) -> None:
    assert not host.is_alive(pid)
    assert host.process(pid) is None


def test_a_process_that_may_not_be_asked_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert host.is_alive(1 << 40)


def test_where_proc_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "maps").mkdir()  # which cannot be read
    assert host.has_mapped(7, b"", tmp_path) is None
    assert host.pids(tmp_path) == [7]
    assert host.pids(tmp_path / "missing") is None
    assert host.mount_of(tmp_path / "missing") is None


def test_a_machine_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fact has a value all the same."""
    from mmlane.host import proc

    monkeypatch.setattr(proc, "PROC", tmp_path)
    assert host.max_map_count() is None
    assert host.overflow_uid() == 65534
    assert host.pid_namespace() is None
    assert host.lane_scope() == ":0"


def test_where_dev_shm_is_mounted() -> None:
    mount = host.mount_of(host.SHM)
    assert mount is None or mount.point == str(host.SHM) or host.SHM.is_relative_to(mount.point)

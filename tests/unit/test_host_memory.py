"""How much memory there is, by files as the kernel writes them, and by any others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given

from mmlane import host
from tests.unit.kernel_files import FILES


def proc(path: Path, cgroup: str, mount: str) -> Path:
    (path / "proc").mkdir()
    (path / "proc" / "cgroup").write_text(cgroup)
    (path / "proc" / "mountinfo").write_text(mount)
    return path / "proc"


def test_the_tightest_limit_of_a_version_2_group_counts(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    inner = top / "pod" / "container"
    inner.mkdir(parents=True)
    for directory, limit, used in ((top / "pod", "1048576", "4096"), (inner, "max", "2048")):
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{used}\n")
    mount = f"30 20 0:26 / {top} rw - cgroup2 cgroup2 rw\n31 20 0:27 / /proc rw - proc proc rw\n"
    found = host.memory(proc(tmp_path, "0::/pod/container\n", mount))
    assert (found.limit, found.used) == (1048576, 4096)
    assert found.total > 1048576


def test_a_version_1_group_and_its_way_of_saying_no_limit(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    (top / "job").mkdir(parents=True)
    (top / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (top / "job" / "memory.limit_in_bytes").write_text("2097152\n")
    (top / "job" / "memory.usage_in_bytes").write_text("1024\n")
    mount = f"30 20 0:26 /docker/x {top} rw - cgroup cgroup rw,memory\n"
    found = host.memory(proc(tmp_path, "4:memory:/docker/x/job\n0::/\n", mount))
    assert (found.limit, found.used) == (2097152, 1024)
    (top / "job" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host.memory(tmp_path / "proc").limit is None


def test_without_cgroups(tmp_path: Path) -> None:
    assert host.memory(tmp_path / "missing").limit is None


GIB = 1 << 30


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    """A machine that says it has 3 GiB left."""
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       25276076 kB\nMemAvailable:    3145728 kB\nHugePages_Total:       0\n")
    return file


def version_2(path: Path, groups: dict[str, dict[str, str]]) -> Path:
    """A /proc/self whose version 2 control group is the last of these; a group's files by name."""
    top = path / "cgroup"
    for name, files in groups.items():
        (top / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (top / name / file).write_text(text)
    return proc(path, f"0::/{list(groups)[-1]}\n", f"30 20 0:26 / {top} rw - cgroup2 cgroup2 rw\n")


def test_without_a_limit_the_machine_says_what_is_available(tmp_path: Path, meminfo: Path) -> None:
    assert host.memory(tmp_path / "missing", meminfo).available == 3 * GIB
    groups = {"job": {"memory.max": "max\n", "memory.current": f"{5 * GIB}\n", "memory.stat": "inactive_file 0\n"}}
    assert host.memory(version_2(tmp_path, groups), meminfo).available == 3 * GIB


def test_without_meminfo_all_memory_counts_as_available(tmp_path: Path) -> None:
    found = host.memory(tmp_path / "missing", tmp_path / "missing")
    assert found.total - 1024 < found.available <= found.total


def test_what_is_available_here() -> None:
    found = host.memory()
    assert 0 < found.available <= found.total
    assert found.available <= (found.limit or found.total)


@pytest.mark.parametrize(
    ("used", "stat", "available"),
    [
        (GIB // 2, "", GIB // 2),
        (GIB // 2, "anon 5\n", GIB // 2),
        # Caches can be dropped; what lies in shared memory cannot, though it is among the files.
        (GIB, f"inactive_file {GIB // 4}\nactive_file {GIB // 8}\nshmem {GIB // 2}\nfile {GIB}\n", 3 * GIB // 8),
        (GIB, "inactive_file none\nactive_file\n\n", 0),
        (GIB + 4096, "", 0),  # for a moment it can be over its limit
        (GIB, f"total_inactive_file {GIB // 2}\n", GIB // 2),
    ],
)
def test_a_version_2_limit_less_what_is_used_and_cannot_be_dropped(
    tmp_path: Path, meminfo: Path, used: int, stat: str, available: int
) -> None:
    groups = {"job": {"memory.max": str(GIB), "memory.current": str(used), "memory.stat": stat}}
    assert host.memory(version_2(tmp_path, groups), meminfo).available == available


def test_the_group_with_the_least_left_counts_not_the_one_with_the_tightest_limit(
    tmp_path: Path, meminfo: Path
) -> None:
    groups = {
        "pod": {"memory.max": str(2 * GIB), "memory.current": str(2 * GIB - 4096)},
        "pod/container": {"memory.max": str(GIB), "memory.current": str(GIB // 2)},
    }
    found = host.memory(version_2(tmp_path, groups), meminfo)
    assert (found.limit, found.used, found.available) == (GIB, GIB // 2, 4096)


def test_a_group_that_says_nothing_of_its_use(tmp_path: Path, meminfo: Path) -> None:
    found = host.memory(version_2(tmp_path, {"job": {"memory.max": str(GIB)}}), meminfo)
    assert (found.limit, found.used, found.available) == (GIB, None, GIB)


def test_the_machine_can_have_less_left_than_the_group(tmp_path: Path, meminfo: Path) -> None:
    groups = {"job": {"memory.max": str(8 * GIB), "memory.current": "0"}}
    assert host.memory(version_2(tmp_path, groups), meminfo).available == 3 * GIB


def test_a_version_1_group_counts_the_caches_of_those_below_it(tmp_path: Path, meminfo: Path) -> None:
    """Its limit holds for all of them; `total_` are the figures that include them."""
    top = tmp_path / "memory"
    (top / "job").mkdir(parents=True)
    for name, text in (
        ("memory.limit_in_bytes", str(GIB)),
        ("memory.usage_in_bytes", str(GIB // 2)),
        ("memory.stat", "inactive_file 1\nactive_file 2\ntotal_inactive_file 4096\ntotal_active_file 8192\n"),
    ):
        (top / "job" / name).write_text(text)
    mount = f"30 20 0:26 / {top} rw - cgroup cgroup rw,memory\n"
    found = host.memory(proc(tmp_path, "4:memory:/job\n", mount), meminfo)
    assert (found.limit, found.available) == (GIB, GIB // 2 + 12288)


def test_a_mount_whose_name_is_no_text(tmp_path: Path, meminfo: Path) -> None:
    here = version_2(tmp_path, {"job": {"memory.max": str(GIB), "memory.current": "0"}})
    with (here / "mountinfo").open("ab") as file:
        file.write(b"31 20 0:27 / /mnt/\xff\xfe rw - ext4 /dev/vdb rw\n")
    assert host.memory(here, meminfo).available == GIB


@pytest.fixture(scope="module")
def anything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anything")


@given(mountinfo=FILES, cgroup=FILES, meminfo=FILES)
@example(b"30 20 0:26 / / rw - tmpfs  rw\n", b"", b"MemAvailable: " + b"9" * 5000)
@example(b"30 20 0:26 /\n30 20 0:26 /a /b\\000c rw - cgroup2 x rw", b"0::\n0::/a/d", b"MemAvailable: \xc2\xb2")
@example(b"30 20 0:26  /sys rw - cgroup2 x rw", b"0::/\n1:memory\n:\n", b"\xff")
def test_memory_is_read_whatever_is_in_proc(
    anything: Path, mountinfo: bytes, cgroup: bytes, meminfo: bytes
) -> None:
    for name, content in (("mountinfo", mountinfo), ("cgroup", cgroup), ("meminfo", meminfo)):
        (anything / name).write_bytes(content)
    found = host.memory(anything, anything / "meminfo")
    assert 0 <= found.available <= found.total
    assert all(isinstance(mount, host.Mount) for mount in host.mounts(anything / "mountinfo"))


@given(limit=FILES, used=FILES, stat=FILES)
@example(b"9" * 5000, b"\xc2\xb2", b"inactive_file " + b"9" * 5000)
@example(b"1", b"\xff", b"active_file \xff")
@example(b"4096", b"", b"inactive_file 99999999999999999999")
def test_memory_is_read_whatever_a_control_group_says(
    anything: Path, limit: bytes, used: bytes, stat: bytes
) -> None:
    for name, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        (anything / name).write_bytes(content)
    (anything / "cgroup").write_bytes(b"0::/\n")
    (anything / "mountinfo").write_bytes(b"30 20 0:26 / %b rw - cgroup2  rw" % os.fsencode(anything))
    found = host.memory(anything)
    assert 0 <= found.available <= found.total


@pytest.mark.parametrize(
    ("group", "root", "inside"),
    [
        ("/", "/", ""),
        ("/pod/a", "/pod", "a"),
        ("/pod/a", "/", "pod/a"),
        ("/../../other", "/", ""),  # outside of this cgroup namespace
        ("/pod", "/pod/a", ""),
        ("/pods", "/pod", ""),
        ("", "/", ""),
        ("/a", "", ""),
    ],
)
def test_the_way_to_a_group_in_what_is_mounted(tmp_path: Path, group: str, root: str, inside: str) -> None:
    here = tmp_path / "top" / inside
    here.mkdir(parents=True)
    (here / "memory.max").write_text("4096\n")
    mount = f"30 20 0:26 {root} {tmp_path / 'top'} rw - cgroup2 x rw\n"
    assert host.memory(proc(tmp_path, f"0::{group}\n", mount)).limit == 4096


@pytest.mark.parametrize("nbytes", [-1, 0, 1 << 62, 1 << 80])
def test_a_size_for_which_there_is_no_room(nbytes: int) -> None:
    assert host.room_problem(nbytes)
    assert not host.room_problem(1 << 20)


def test_where_nothing_can_be_tried_no_problem_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert host.room_problem(1 << 80) == ""

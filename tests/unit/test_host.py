"""Facts about the machine: segments in the real /dev/shm, kernel features really tried, cgroup limits."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmlane import host


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
    monkeypatch.setattr(host, "pid_namespace", lambda: None)
    assert host.maker(our_name(os.getpid())) == (os.getpid(), None)


def test_the_names_are_those_that_our_pointer_gives() -> None:
    pytest.importorskip("torch")
    from mmlane.transport.segment import segment_name

    assert host.maker(segment_name()) == (os.getpid(), True)


@pytest.mark.parametrize(
    ("name", "pid"),
    [
        ("sgl_shm_mm_1_0a1b2c3d", 1),
        ("sgl_shm_some_kind_1_0a1b2c3d", 1),
        ("sgl_shm_mm_99999999999999999999_0a1b2c3d", 99999999999999999999),
        ("sgl_shm_mm_0_0a1b2c3d", None),
        ("sgl_shm_mm", None),
        ("psm_12345678", None),
        ("mmlane_something", None),
        ("mmlane_0_1_2_0a", None),
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


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_kernel_features_are_tried() -> None:
    found = {feature.name: feature for feature in host.kernel_features()}
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    for name, feature in found.items():
        assert feature.works or feature.problem, name
        if not name.startswith("MADV_POPULATE") or release >= (5, 14):
            assert feature.works, feature.problem
    assert len(found) == 10


def test_a_feature_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command, argument: 0)  # seals that do not hold
    monkeypatch.delattr(os, "posix_fallocate")
    before = descriptors()
    found = {feature.name: feature for feature in host.kernel_features()}
    assert found["F_ADD_SEALS"].problem == "a sealed memfd could be shrunk"
    assert "built without it" in found["posix_fallocate"].problem
    assert not found["F_ADD_SEALS"].works and not found["posix_fallocate"].works
    assert descriptors() == before


def test_nothing_is_left_open_or_bound() -> None:
    before = descriptors()
    host.kernel_features()
    assert descriptors() == before
    assert f"mmlane-doctor-{os.getpid()}-" not in Path("/proc/net/unix").read_text()


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


def test_without_a_word_about_it_all_memory_is_available(tmp_path: Path) -> None:
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


# --- whatever is in the files -------------------------------------------------------------------------------

FIELDS = [
    "",
    "-",
    "30",
    "0:26",
    "/",
    "/..",
    "//",
    "rw",
    "cgroup",
    "cgroup2",
    "memory",
    "rw,memory",
    "max",
    "kB",
    "0",
]
WORDS = st.one_of(
    st.sampled_from([*FIELDS, "\\040", "a\\134b", "\\777", "\0", "²", "٣", "\ud800", "9" * 5000, "MemAvailable:"]),
    st.text(max_size=4),
)
LINES = st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=4).map("\n".join)
FILES = st.one_of(st.binary(max_size=80), LINES.map(lambda text: text.encode(errors="surrogatepass")))


@pytest.fixture(scope="module")
def anything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anything")


@given(mountinfo=FILES, cgroup=FILES, meminfo=FILES)
@example(b"30 20 0:26 / / rw - tmpfs  rw\n", b"", b"MemAvailable: " + b"9" * 5000)
@example(b"30 20 0:26 /\n30 20 0:26 /a /b\\000c rw - cgroup2 x rw", b"0::\n0::/a/d", b"MemAvailable: \xc2\xb2")
@example(b"30 20 0:26  /sys rw - cgroup2 x rw", b"0::/\n1:memory\n:\n", b"\xff")
def test_memory_is_told_whatever_is_in_proc(
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
def test_memory_is_told_whatever_a_control_group_says(
    anything: Path, limit: bytes, used: bytes, stat: bytes
) -> None:
    for name, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        (anything / name).write_bytes(content)
    (anything / "cgroup").write_bytes(b"0::/\n")
    (anything / "mountinfo").write_bytes(b"30 20 0:26 / %b rw - cgroup2  rw" % os.fsencode(anything))
    found = host.memory(anything)
    assert 0 <= found.available <= found.total


@given(FILES)
@example(b"")
@example(b"7 (a) b) S 1 2")
@example(b"7 (a) S " + b"9" * 5000 + b" x" * 40)
@example(b"7 (a) S" + b" \xc2\xb2" * 40)
def test_a_process_is_told_or_not_whatever_is_in_its_file(anything: Path, content: bytes) -> None:
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

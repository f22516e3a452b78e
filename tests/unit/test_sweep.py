"""The sweep of /dev/shm: real files, real processes, in a container of their own.

pytest is outside of it: whatever it leaves there is by a maker who is out of sight, and it runs Python.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from devkit.container import Container
from devkit.sharedmemory import can_be_private, privately
from mmlane import log
from mmlane.settings import SettingsError, read
from mmlane_patches import leftovers, shm_sweep, verdicts

MIB = 1 << 20
FAMILIES = ("psm", "sgl", "mmlane")
PSM, SGL = "psm_0123abcd", "sgl_shm_mm_4711_0123abcd"
ELSEWHERE = "mmlane_4711_12345_4026530000_0123456789abcdef"  # of another pid namespace
LOCK = f"mmlane-sweep-{os.geteuid()}"
AS_ANOTHER_USER = ("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "--")
SWEPT = (
    "mmlane: reclaimed 1 segment (1.0 MiB) that a crashed engine left in /dev/shm; MMLANE_SWEEP=0 leaves them\n"
)

MODULES = "import fcntl, os, time; from mmlane import host; from mmlane_patches import leftovers, verdicts" + (
    "; from mmlane_patches.shm_sweep import sweep"
)
MAKER = """
import mmap, os, secrets, sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
resource_tracker.register = lambda *_: None  # a tracker cleans up; an engine that is killed takes it along
family, library = sys.argv[1:]
if library:
    code = mmap.mmap(os.open(library, os.O_RDONLY), 0, access=mmap.ACCESS_READ)
started = open("/proc/self/stat").read().rpartition(")")[2].split()[19]
name = {
    "psm": None,
    "sgl": f"sgl_shm_mm_{os.getpid()}_{secrets.token_hex(4)}",
    "mmlane": f"mmlane_{os.getpid()}_{started}_{os.stat('/proc/self/ns/pid').st_ino}_{secrets.token_hex(8)}",
}[family]
segment = SharedMemory(name, create=True, size=1 << 20)
segment.buf[:] = bytes(1 << 20)
segment.close()
print(segment.name, flush=True)
sys.stdin.read()
"""


class Living:
    """A process in the container, until `kill`."""

    def __init__(self, container: Container, *command: str) -> None:
        self._process = subprocess.Popen(
            container.inside(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()

    def kill(self) -> None:
        pid = self._process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), 9)
        self._process.wait()

    def __enter__(self) -> Living:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes its pipes
            if self._process.poll() is None:
                self.kill()


@pytest.fixture
def container() -> Iterator[Container]:
    if not can_be_private():
        pytest.skip("needs the right to make namespaces")
    with Container() as container:
        yield container


@pytest.fixture
def torch(tmp_path: Path) -> str:
    """What a process with torch in it has mapped."""
    library = tmp_path / "libtorch_cpu.so"
    library.write_bytes(bytes(mmap.PAGESIZE))
    return str(library)


def leave(container: Container, *names: str) -> None:
    """Files that no visible process has made, older than any process that starts from now on."""
    for name in names:
        file = container.shm / name
        file.touch(mode=0o600)
        file.write_bytes(bytes(MIB))
    grow_old()


def grow_old() -> None:
    time.sleep(2 * verdicts.SLACK_S)


def sweep(container: Container, chosen: str = "private", before: str = "") -> str:
    """What an engine that starts there says of its sweep. `before` is run first, with `sweep` and the modules."""
    code = f"{MODULES}\n{before}\nsweep()"
    environ = {**os.environ, "MMLANE_SWEEP": chosen}
    command = container.inside([sys.executable, "-c", code])
    # The limit ends a sweep that blocks, such as one that opens a FIFO without a writer.
    done = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, check=True, timeout=60)
    return done.stderr


def there(container: Container) -> set[str]:
    return {entry.name for entry in container.shm.iterdir()}


# --- dead ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_living_makers_segment_on_its_way_stays_and_a_killed_ones_goes(
    container: Container, family: str, torch: str
) -> None:
    with Living(container, sys.executable, "-c", MAKER, family, torch) as maker:
        assert there(container) == {maker.said}
        grow_old()
        told = sweep(container)
        assert there(container) == {maker.said}
        if family == "mmlane":
            assert told == ""  # known to be alive; of the others there is reason to tell
        else:
            assert re.search(r"left 1 segment \(1.0 MiB\).* is older", told)
        maker.kill()
        assert sweep(container) == SWEPT
        assert there(container) == set()


def test_a_zombie_maker_counts_as_dead(container: Container) -> None:
    """As in a container whose first process does not do so."""
    zombie = ["sh", "-c", '"$@" & exec sleep 1000', "sh", sys.executable, "-c", MAKER, "mmlane", ""]
    with Living(container, *zombie) as parent:
        pid = parent.said.split("_")[1]
        state = Path(f"/proc/{container.pid}/root/proc/{pid}/stat")
        while state.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert sweep(container) == SWEPT


def test_a_thousand(container: Container) -> None:
    leave(container, *(f"psm_{number:08x}" for number in range(1000)))
    assert "reclaimed 1000 segments (1000.0 MiB)" in sweep(container)
    assert there(container) == set()


def test_what_is_not_an_engines_stays(container: Container) -> None:
    names = ["mine", "psm_mine", "sem.mp-0123abcd", "nccl-0123", "mmlane_0123", f"{PSM}0", f"{SGL}0"]
    leave(container, *names, PSM)
    assert sweep(container) == SWEPT
    assert there(container) == set(names)


def test_what_is_not_a_plain_private_file_of_ours_stays(container: Container) -> None:
    def name(number: int) -> str:
        return f"psm_{number:08x}"

    shm = container.shm
    leave(container, *map(name, range(4)))
    os.chown(shm / name(0), 12345, 12345)
    (shm / name(1)).chmod(0o640)
    (shm / "another").hardlink_to(shm / name(2))
    (shm / name(4)).symlink_to("another")
    (shm / name(5)).mkdir()
    os.mkfifo(shm / name(6), 0o600)
    grow_old()
    before = there(container)
    assert sweep(container) == SWEPT
    assert there(container) == before - {name(3)}


# --- pids repeat ---


def name_of(container: Container, pid: int, started: int) -> str:
    namespace = Path(f"/proc/{container.pid}/ns/pid").stat().st_ino
    return f"mmlane_{pid}_{started}_{namespace}_0123456789abcdef"


UNTIL_30 = ["sh", "-c", "while :; do sleep 1000 >&- & [ $! -ge 30 ] && break; done; echo; wait"]


@pytest.mark.parametrize("name", [SGL.replace("4711", "30"), None])
def test_a_pid_that_a_younger_process_has_reused(container: Container, name: str | None) -> None:
    leave(container, name or name_of(container, 30, 12345))
    with Living(container, *UNTIL_30):
        assert sweep(container) == SWEPT


def test_a_pid_of_a_process_that_may_have_been_the_maker(container: Container) -> None:
    """It is older than the segment. That its start time is another may be due to another time namespace."""
    with Living(container, *UNTIL_30) as older:
        grow_old()
        leave(container, name_of(container, 30, 12345))
        assert sweep(container) == ""
        older.kill()
    assert there(container)


def test_a_maker_by_its_start_time_alone(container: Container) -> None:
    """Even if the clock was set forward, and it seems to be younger than its segment."""
    with Living(container, sys.executable, "-c", MAKER, "mmlane", "") as maker:
        forward = "now = time.time; time.time = lambda: now() + 3600"
        assert sweep(container, before=forward) == ""
        assert there(container) == {maker.said}


def test_a_maker_without_a_start_time_is_not_known(container: Container) -> None:
    leave(container, name_of(container, 30, 0))
    assert verdicts.UNSEEN in sweep(container, "1")
    assert there(container)


# --- who else may want it ---


@pytest.mark.parametrize("name", [PSM, SGL, ELSEWHERE])
def test_an_older_engine_may_want_what_the_dead_left(container: Container, name: str, torch: str) -> None:
    """Also a scheduler that a living tokenizer of an unseen name has sent it to."""
    with Living(container, sys.executable, "-c", MAKER, "mmlane", torch) as engine:
        leave(container, name)
        told = sweep(container)
        assert f"left 1 segment (1.0 MiB) in /dev/shm, {name} among them: process " in told
        assert there(container) == {name, engine.said}
        engine.kill()
        assert "reclaimed 2 segments" in sweep(container)


def test_a_python_without_torch_may_want_only_segments_with_pythons_default_names(container: Container) -> None:
    with Living(container, sys.executable, "-c", MAKER, "mmlane", "") as program:
        leave(container, PSM, SGL, ELSEWHERE)
        told = sweep(container)
        assert "reclaimed 2 segments" in told
        assert "left 1 segment" in told
        assert there(container) == {PSM, program.said}


def test_a_younger_engine_knows_nothing_of_it(container: Container, torch: str) -> None:
    leave(container, PSM, SGL, ELSEWHERE)
    with Living(container, sys.executable, "-c", MAKER, "mmlane", torch) as engine:
        assert "reclaimed 3 segments" in sweep(container)
        assert there(container) == {engine.said}


def test_another_users_processes_do_not_count(container: Container) -> None:
    code = "print(flush=True); import sys; sys.stdin.read()"
    python = "/usr/bin/python3"  # one that every user may run
    if not Path(python).exists():
        pytest.skip(f"no {python}")
    with Living(container, *AS_ANOTHER_USER, python, "-c", code):
        leave(container, PSM)
        assert sweep(container) == SWEPT


@pytest.mark.parametrize("how", ["reading", "writing", "mapped", "mapped privately"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_process_has_open_or_mapped_stays(container: Container, family: str, how: str, torch: str) -> None:
    """By a process that is out of sight: this one."""
    with Living(container, sys.executable, "-c", MAKER, family, torch) as maker:
        maker.kill()
    grow_old()
    file = os.open(
        container.shm / maker.said, os.O_RDONLY if how in ("reading", "mapped privately") else os.O_RDWR
    )
    mapping = None
    if how.startswith("mapped"):
        flags = mmap.MAP_PRIVATE if how == "mapped privately" else mmap.MAP_SHARED
        mapping = mmap.mmap(file, MIB, flags, mmap.PROT_READ)
        os.close(file)
    assert sweep(container) == ""
    assert there(container) == {maker.said}
    if mapping is not None:
        mapping.close()
    else:
        os.close(file)
    assert sweep(container) == SWEPT


@pytest.mark.parametrize(
    "hidden",
    ["host.process = lambda pid: None", "host.status_numbers = lambda pid, field: [1][field == 'Uid' :]"],
)
def test_a_process_that_does_not_tell_what_it_is_may_be_as_old_as_any(container: Container, hidden: str) -> None:
    own = name_of(container, 1, 12345)
    leave(container, own, PSM)
    assert re.search(
        rf"left 1 segment \(1.0 MiB\) in /dev/shm, {PSM} among them: process \d+ \(\?\) is older",
        sweep(container, before=hidden),
    )
    assert there(container) == {own, PSM}


# --- what cannot be seen ---


def test_another_container_may_share_it(container: Container) -> None:
    """Only what this pid namespace has made is known to be dead."""
    own = name_of(container, 4711, 12345)
    leave(container, own, PSM, SGL, ELSEWHERE)
    told = sweep(container, "1")
    assert told.startswith(SWEPT)
    assert "left 3 segments (3.0 MiB)" in told
    assert verdicts.UNSEEN in told
    assert there(container) == {PSM, SGL, ELSEWHERE}
    assert "reclaimed 3 segments" in sweep(container, "private")


@pytest.mark.parametrize(
    ("do", "why"),
    [
        ("mount -o remount,hidepid=2 /proc", "/proc hides processes (hidepid)"),
        ("umount /proc", "/proc is that of another pid namespace"),
        ("mkdir /dev/shm/real && mount --bind {disk} /dev/shm", "/dev/shm is not a tmpfs"),
    ],
)
def test_everything_stays_where_not_everything_is_seen(
    container: Container, do: str, why: str, tmp_path: Path
) -> None:
    subprocess.run(container.inside(["sh", "-ec", do.format(disk=tmp_path)]), check=True)
    own = name_of(container, 4711, 12345)
    leave(container, own, PSM, SGL)
    told = sweep(container)
    # Without its /proc it has no word for its own namespace either.
    assert f": {why}; {verdicts.BY_HAND}\n" in told
    assert {own, PSM, SGL} <= there(container)
    assert "reclaimed" not in told


@pytest.mark.parametrize(
    ("unknown", "why"),
    [
        ("host.mount_of = lambda path: None", "/proc/self/mountinfo does not tell what /dev/shm is"),
        ("host.pids = lambda: None", "/proc cannot be listed"),
    ],
)
def test_everything_stays_where_too_little_is_known(container: Container, unknown: str, why: str) -> None:
    leave(container, PSM)
    assert f"{why}; {verdicts.BY_HAND}\n" in sweep(container, before=unknown)
    assert there(container) == {PSM}


def test_a_kernel_without_leases(container: Container) -> None:
    leave(container, PSM)
    broken = f"def refuse(*_): raise OSError({errno.EINVAL}, 'Invalid argument')\nfcntl.fcntl = refuse"
    assert "left 1 segment" in (told := sweep(container, before=broken))
    assert "Invalid argument, so that nothing can be known of them" in told
    assert there(container) == {PSM}


def test_in_the_first_namespace_all_processes_are_visible() -> None:
    """And this process runs Python and is older than what it leaves."""
    if Path("/proc/self/ns/pid").stat().st_ino != verdicts.FIRST_PID_NAMESPACE or not can_be_private():
        pytest.skip("needs the right to make namespaces, and the first pid namespace")
    script = (
        f"umask 077; head -c {MIB} /dev/zero > /dev/shm/{PSM}; "
        f"{sys.executable} -c 'from mmlane_patches.shm_sweep import sweep; sweep()'; ls /dev/shm"
    )
    done = subprocess.run(privately(["sh", "-c", script], 2 * MIB), capture_output=True, text=True, check=True)
    assert re.search(r"left 1 segment \(1.0 MiB\).*: process \d+ \(.+\) is older", done.stderr), done.stderr
    assert done.stdout.split() == [PSM]


# --- changes during a sweep ---


@pytest.mark.parametrize(
    "change",
    [
        "os.utime(file)",  # moves its change time
        "os.unlink(file); open(file, 'wb').close(); os.chmod(file, 0o600)",
        "os.truncate(file, 4096)",
    ],
)
def test_a_segment_that_was_changed_since_it_was_looked_at_stays(container: Container, change: str) -> None:
    leave(container, PSM)
    change_late = (
        "made = leftovers.Verdicts\n"
        f"def late(private):\n    file = '/dev/shm/{PSM}'\n    {change}\n    return made(private)\n"
        "leftovers.Verdicts = late\nverdicts._younger = lambda *_: True"
    )
    assert sweep(container, before=change_late) == ""
    assert there(container) == {PSM}


def test_only_one_of_two_that_start_at_once_sweeps(container: Container) -> None:
    leave(container, PSM)
    lock = container.shm / LOCK
    with lock.open("w") as file:
        lock.chmod(0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(container) == ""
        assert there(container) == {PSM, LOCK}
    assert sweep(container) == SWEPT  # also the lock's file, which one that was killed has left
    assert there(container) == set()


def test_the_other_sweep_has_just_finished(container: Container) -> None:
    """And has removed the lock's file. The next to start makes a new one, and must not meet us."""
    leave(container, PSM)
    finished = (
        "flock = fcntl.flock\n"
        f"def late(*how):\n    os.unlink('/dev/shm/{LOCK}')\n    flock(*how)\n"
        "fcntl.flock = late"
    )
    assert sweep(container, before=finished) == ""
    assert there(container) == {PSM}


def test_where_no_lock_can_be_had_the_sweep_goes_on(container: Container) -> None:
    leave(container, PSM)
    failing = (
        "import errno\n"
        "def none_left(*how):\n    raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.flock = none_left"
    )
    assert sweep(container, before=failing) == SWEPT
    assert PSM not in there(container)


def test_another_users_lock_on_dev_shm_stops_no_sweep(container: Container) -> None:
    leave(container, PSM)
    with Living(container, *AS_ANOTHER_USER, "flock", "/dev/shm", "sh", "-c", "echo; exec cat"):
        assert sweep(container) == SWEPT


@pytest.mark.parametrize(
    "make",
    [
        "umask 0; : > {lock}; exec flock {lock} sh -c 'echo; exec cat'",
        "mkdir {lock}",
        "mkfifo -m 666 {lock}",
        "ln -s {lock} {lock}",
        "ln -s /dev/shm/ours {lock}",
    ],
)
def test_another_user_who_has_the_locks_name_stops_no_sweep(container: Container, make: str) -> None:
    """Whether fs.protected_regular has the kernel refuse us that file, or not."""
    leave(container, PSM, "ours")
    with (container.shm / "ours").open() as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        command = make.format(lock=f"/dev/shm/{LOCK}") + "; echo; exec cat"
        with Living(container, *AS_ANOTHER_USER, "sh", "-c", command):
            assert sweep(container) == SWEPT
            assert there(container) == {"ours", LOCK}


def test_a_second_name_of_a_file_of_ours_is_not_our_lock(container: Container) -> None:
    """Where fs.protected_hardlinks is 0, another user can give it one."""
    leave(container, PSM, "ours")
    (container.shm / LOCK).hardlink_to(container.shm / "ours")
    with (container.shm / "ours").open() as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        assert sweep(container) == SWEPT
    assert there(container) == {"ours", LOCK}


AT_ONCE = """
import os
go, start = os.pipe()
sweepers = []
for _ in range(8):
    sweepers.append(os.fork())
    if sweepers[-1] == 0:
        os.close(start)
        os.read(go, 1)
        sweep()
        os._exit(0)
os.close(start)
for sweeper in sweepers:
    assert os.waitpid(sweeper, 0)[1] == 0
os._exit(0)
"""


@pytest.mark.parametrize("locked", [True, False])
def test_many_that_start_at_once(container: Container, locked: bool) -> None:
    """Nothing wrong is unlinked, nothing reclaimed twice, nothing false said. With the lock, nothing is missed."""
    dead = {f"{name_of(container, 4711, 12345)[:-4]}{number:04x}" for number in range(200)}
    kept = {name_of(container, 1, 12345), "mine"}
    leave(container, *dead, *kept)
    if not locked:  # as another user can have it
        (container.shm / LOCK).mkdir()
        kept.add(LOCK)
    said = sweep(container, "1", before=AT_ONCE)
    left = there(container)
    reclaimed = [int(number) for number in re.findall(r"reclaimed (\d+) segments? ", said)]
    assert kept <= left <= kept | dead
    assert sum(reclaimed) == len(dead - left)
    assert said.count("\n") == len(reclaimed)
    if locked:
        assert left == kept and len(reclaimed) == 1


def test_a_process_that_opens_a_segment_during_the_sweep_waits_and_lives_on(container: Container) -> None:
    leave(container, PSM)
    opened = (
        "import os, subprocess\nunlink = os.unlink\n"
        "def slow(name, dir_fd):\n"
        "    os.unlink = unlink\n"
        f"    opener = subprocess.Popen(['cat', '/dev/shm/{PSM}'], stdout=subprocess.DEVNULL)\n"
        "    while not b'break_lease' in (wchan := open(f'/proc/{opener.pid}/wchan', 'rb').read()):\n"
        "        assert opener.poll() is None, wchan\n"
        "    unlink(name, dir_fd=dir_fd)\n"
        "os.unlink = slow"
    )
    assert sweep(container, before=opened) == SWEPT


# --- the engine starts ---


def test_0_leaves_everything(container: Container) -> None:
    leave(container, PSM, name_of(container, 4711, 12345))
    assert sweep(container, "0") == ""
    assert len(there(container)) == 2


def test_nothing_in_it_stops_the_engine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log, "_said", set())

    def fail(private: bool) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/dev/shm")

    monkeypatch.setattr(leftovers, "reclaim", fail)
    monkeypatch.delenv("MMLANE_SWEEP", raising=False)
    launch = shm_sweep.before_launch(lambda server_args: [server_args])
    assert launch("args") == ["args"]
    (line,) = caplog.messages
    assert line.startswith("mmlane: sweep failed: PermissionError: ") and "leftovers in /dev/shm stay" in line


def test_a_file_that_cannot_be_unlinked_is_told(container: Container) -> None:
    leave(container, PSM)
    subprocess.run(container.inside(["mount", "-o", "remount,ro", "/dev/shm"]), check=True)
    assert "Read-only file system" in sweep(container)
    assert there(container) == {PSM}


def test_the_setting() -> None:
    assert [read({"MMLANE_SWEEP": value}).sweep for value in ("", "0", "1", "private")] == [
        "1",
        "0",
        "1",
        "private",
    ]
    with pytest.raises(SettingsError, match="MMLANE_SWEEP=all is not one of: 0, 1, private"):
        read({"MMLANE_SWEEP": "all"})

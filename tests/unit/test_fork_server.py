"""The devkit's fork server, with modules and scripts that are made here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devkit.fork_server import ForkServer, ForkServerDied, TimedOut
from devkit.sharedmemory import can_be_private

LIMIT_S = 60
HEAVY = """
import os
with open(os.environ["IMPORTS"], "a") as imports:
    print("imported", file=imports)
choice = os.environ.get("CHOICE", "none")
os.environ["SET"] = "by heavy"
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "heavy.py").write_text(HEAVY)
    return {"PYTHONPATH": str(tmp_path), "IMPORTS": str(tmp_path / "imports")}


@pytest.fixture
def server(env: dict[str, str]) -> Iterator[ForkServer]:
    with ForkServer(Path(sys.executable), ["heavy"], env) as running:
        yield running


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_scripts_run_at_once_after_one_import(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    os.mkfifo(tmp_path / "meeting")
    meet = script(
        tmp_path,
        "import os, sys, heavy\n"
        "print(__name__, os.environ['WHO'], os.environ['SET'], heavy.choice, *sys.argv, sys.path[0])\n"
        "open(sys.argv[1], sys.argv[2]).close()  # waits for the other\n"
        "print('end of', os.environ['WHO'], file=sys.stderr)\n",
    )
    words = {
        "reader": (str(meet), str(tmp_path / "meeting"), "r"),
        "writer": (str(meet), f"{tmp_path}/meeting", "w"),
    }
    running = {who: server.start(argv, env={**env, "WHO": who}) for who, argv in words.items()}
    for who, argv in words.items():
        done = running[who].result(LIMIT_S)
        assert done.returncode == 0
        assert done.stdout == f"__main__ {who} by heavy none {' '.join(argv)} {tmp_path}\n"
        assert done.stderr == f"end of {who}\n"
    assert (tmp_path / "imports").read_text() == "imported\n"


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("sys.exit(3)", 3),
        ("raise LookupError('no')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_a_script_that_fails(
    server: ForkServer, tmp_path: Path, env: dict[str, str], last: str, status: int
) -> None:
    failing = script(tmp_path, f"import os, signal, sys\nprint('begun', flush=True)\n{last}\n")
    for _ in range(2):  # the server outlives it
        done = server.start([failing], env=env).result(LIMIT_S)
        assert (done.returncode, done.stdout) == (status, "begun\n")
        assert ("LookupError: no" in done.stderr) is (status == 1)


HANGS = """
import os, signal, sys
print("begun", flush=True)
with open(sys.argv[1], "w") as held:
    os.fork()
    held.write("held\\n")
    held.flush()
    signal.pause()
"""


def test_a_script_that_hangs_is_killed_with_what_it_forked(
    server: ForkServer, tmp_path: Path, env: dict[str, str]
) -> None:
    os.mkfifo(tmp_path / "held")
    hanging = server.start([script(tmp_path, HANGS), tmp_path / "held"], env=env)
    with (tmp_path / "held").open() as pipe:
        assert [pipe.readline(), pipe.readline()] == ["held\n"] * 2
        with pytest.raises(TimedOut, match="begun"):
            hanging.result(timeout_s=0.01)
        assert pipe.read() == ""  # returns when the last holder of the other end is gone
    assert server.start([script(tmp_path, "")], env=env).result(LIMIT_S).returncode == 0


def test_what_a_script_leaves_running_ends_with_it(
    server: ForkServer, tmp_path: Path, env: dict[str, str]
) -> None:
    os.mkfifo(tmp_path / "held")
    leaves = script(tmp_path, HANGS.replace("os.fork()", "if os.fork(): sys.exit(7)"))
    running = server.start([leaves, tmp_path / "held"], env=env)
    with (tmp_path / "held").open() as pipe:
        assert pipe.read() in ("held\n", "")  # it may be killed before it says so
    assert running.result(LIMIT_S).returncode == 7


def test_its_end_ends_the_scripts(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    os.mkfifo(tmp_path / "held")
    running = server.start([script(tmp_path, HANGS), tmp_path / "held"], env=env)
    with (tmp_path / "held").open() as pipe:
        assert [pipe.readline(), pipe.readline()] == ["held\n"] * 2
        server.close()
        assert pipe.read() == ""
    with pytest.raises(ForkServerDied):
        running.result(LIMIT_S)


CLIENT = """
import os, signal, sys
from pathlib import Path
from devkit.fork_server import ForkServer
server = ForkServer(Path(sys.executable), ["heavy"], dict(os.environ))
running = server.start(sys.argv[1:], env=dict(os.environ))
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_a_killed_client(tmp_path: Path, env: dict[str, str], checkout: Path) -> None:
    os.mkfifo(tmp_path / "held")
    client = subprocess.Popen(
        [
            sys.executable,
            "-c",
            CLIENT,
            str(script(tmp_path, HANGS.replace("os.fork()", ""))),
            str(tmp_path / "held"),
        ],
        env={**os.environ, **env, "PYTHONPATH": f"{tmp_path}:{checkout}"},
        stdin=subprocess.PIPE,
    )
    with (tmp_path / "held").open() as pipe:
        assert pipe.readline() == "held\n"
        client.communicate(b"\n", timeout=LIMIT_S)
        assert pipe.read() == ""
    assert client.returncode == -signal.SIGKILL


def test_threads_before_a_fork_are_refused(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    with ForkServer(Path(sys.executable), ["threaded"], env) as server:
        running = server.start([script(tmp_path, "")], env=env)
        with pytest.raises(ForkServerDied, match="wanted one thread before a fork, found 2"):
            running.result(LIMIT_S)


def test_a_script_that_is_not_there(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    done = server.start([tmp_path / "none.py"], env=env).result(LIMIT_S)
    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_a_module_that_cannot_be_imported(tmp_path: Path, env: dict[str, str]) -> None:
    with ForkServer(Path(sys.executable), ["missing"], env) as server:
        running = server.start([script(tmp_path, "")], env=env)
        with pytest.raises(ForkServerDied, match="No module named 'missing'"):
            running.result(LIMIT_S)


def test_what_was_read_at_the_import_cannot_be_changed(
    server: ForkServer, tmp_path: Path, env: dict[str, str]
) -> None:
    """Neither to another value nor from nothing, unless the script reads it again; other variables can."""
    shows = script(tmp_path, "import heavy, os; print(heavy.choice, os.environ['CHOICE'], os.environ['OTHER'])")
    changed = {**env, "CHOICE": "red", "OTHER": "new"}
    with pytest.raises(ValueError, match=r"read when the server started or imported the modules: CHOICE$"):
        server.start([shows], env=changed).result(LIMIT_S)
    again = server.start([shows], env=changed, read_again=["CHOICE"]).result(LIMIT_S)
    assert again.stdout == "none red new\n"


@pytest.mark.parametrize("server_has", [{}, {"MMLANE_LOG": "debug"}])
def test_mmlanes_variables_cannot_be_changed(
    tmp_path: Path, env: dict[str, str], server_has: dict[str, str]
) -> None:
    """Its .pth file reads them before the server can see what is read. The same values are fine."""
    with ForkServer(Path(sys.executable), [], {**env, **server_has}) as server:
        for other in ("MMLANE", "MMLANE_LOG"):
            with pytest.raises(ValueError, match=rf"imported the modules: {other}$"):
                changed = {**env, **server_has, other: "off"}
                server.start([script(tmp_path, "")], env=changed).result(LIMIT_S)
        assert server.start([script(tmp_path, "")], env={**env, **server_has}).result(LIMIT_S).returncode == 0


@pytest.mark.skipif(not can_be_private(), reason="needs the right to make mount namespaces")
def test_mounts_of_its_own(server: ForkServer, tmp_path: Path, env: dict[str, str]) -> None:
    """The script itself may lie where one of them is."""
    lists = script(
        tmp_path,
        "import os, sys, tempfile\n"
        "before = os.listdir(sys.argv[1])\n"
        "open(sys.argv[1] + '/made', 'w').close()\n"
        "print(before, os.listdir(sys.argv[1]), tempfile.gettempdir())\n",
    )
    mounts = {str(tmp_path): "size=4096,mode=1777"}
    done = server.start([lists, tmp_path], env={**env, "TMPDIR": str(tmp_path)}, mounts=mounts).result(LIMIT_S)
    assert done.stdout == f"[] ['made'] {tmp_path}\n", done.stderr
    assert not (tmp_path / "made").exists()

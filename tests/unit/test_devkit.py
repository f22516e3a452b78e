"""The part of the devkit that can be tried without an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from devkit.server import dies_with_us

STARTS_AND_DIES = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=int(os.environ["TELLS"]), stderr=subprocess.PIPE)
child.stderr.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not dies_with_us(), reason="no setpriv (util-linux) here")
def test_a_server_ends_with_the_process_that_started_it() -> None:
    """A killed test run leaves no engine behind: its pipe is closed by nothing but its end."""
    reader, writer = os.pipe()
    command = [sys.executable, "-c", STARTS_AND_DIES, *dies_with_us(), "sh", "-c", "echo ready >&2; exec sleep 60"]
    died = subprocess.run(
        command, env={**os.environ, "TELLS": str(writer)}, pass_fds=[writer], check=False, timeout=30
    )
    os.close(writer)
    assert died.returncode == -signal.SIGKILL
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b""  # returns when the last holder of the other end is gone

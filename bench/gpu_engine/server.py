"""One server on the GPU: starts it, and has ended every one of its processes when it returns."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bench.harness.machine import CHECKOUT
from devkit.client import Client
from devkit.processes import Family
from devkit.server import ServerDied, dies_with_us, free_port

PLATFORM = "mmlane_bench_gpu"
_INSIDE = Path(__file__).with_name("inside")
_READY_S = 180.0
_LOOK_S = 0.2
_ORDERLY_S = 20.0


class Server:
    """`python -m sglang.launch_server` in a session of its own, in a context.

    Raises ServerDied, with the end of its log, if it ends before it is ready.
    """

    def __init__(self, model: Path, mode: str, scratch: Path, log: Path) -> None:
        port = free_port()
        self.client = Client(f"http://127.0.0.1:{port}")
        self._command = [*dies_with_us(), *command(model, port)]
        self._environ = environ(os.environ, mode, scratch)
        self._log = log
        entry_point(scratch)

    def __enter__(self) -> Server:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
            )
        self._family = Family(self._process.pid)
        try:
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if self.client.get("/model_info").status == 200:
                return
            time.sleep(_LOOK_S)
        raise ServerDied(f"the engine did not get ready:\n{self._log.read_text(errors='replace')[-6000:]}")

    def pids(self) -> set[int]:
        """Its processes."""
        return {member.pid for member in self._family.members()}

    def end(self) -> None:
        """SIGTERM to the main process, as an operator would; what is left after a while is killed."""
        end(self._process, self._family, _ORDERLY_S)


def end(process: subprocess.Popen[bytes], family: Family, orderly_s: float) -> None:
    """Return when every process of the family has ended; those that take longer than `orderly_s` are killed."""
    deadline = time.monotonic() + orderly_s
    family.members()  # one that leaves the session is remembered
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(orderly_s)
    for member in family.members():  # the others follow it, multiprocessing's tracker of semaphores last
        wait(member.pid, max(deadline - time.monotonic(), 0.0))
    while members := family.members():
        for member in members:
            wait(member.pid, None, signal.SIGKILL)
    process.wait()


def wait(pid: int, timeout_s: float | None, sig: signal.Signals | None = None) -> None:
    """Send a process a signal, if one is given, and wait until it has ended, or for so long."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:  # ended in between
        return
    try:
        if sig is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, sig)
        select.select([handle], [], [], timeout_s)  # readable when it has ended
    finally:
        os.close(handle)


def command(model: Path, port: int) -> Sequence[str]:
    return [
        sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--device", "cuda", "--tp", "1", "--dtype", "float32",
        "--attention-backend", "torch_native", "--disable-cuda-graph", "--disable-overlap-schedule",
        "--mem-fraction-static", "0.3", "--max-total-tokens", "131072", "--chunked-prefill-size", "65536",
        "--skip-server-warmup", "--disable-radix-cache", "--mm-feature-transport", "cpu",
    ]  # fmt: skip


def environ(ours: Mapping[str, str], mode: str, scratch: Path) -> dict[str, str]:
    """The server's environment: the caller's, but for what that says about Python, the engine or mmlane."""
    kept = {k: v for k, v in ours.items() if not k.startswith(("PYTHON", "SGLANG_", "MMLANE"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(str, (_INSIDE, scratch, CHECKOUT))),
        "SGLANG_PLATFORM": PLATFORM,
        "MMLANE": mode,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",  # compiling for one tiny model costs more than it gains
    }


def entry_point(directory: Path) -> None:
    """Let importlib.metadata find the platform, where `directory` is on Python's path."""
    info = directory / f"{PLATFORM}-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLATFORM}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.platforms]\n{PLATFORM} = {PLATFORM}:activate\n")

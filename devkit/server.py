"""Runs one real engine server: start it, ask it, watch its processes and its memory, end it.

    with EngineServer("0.5.23") as server:
        print(server.chat([jpeg(640, 480)], "What is this?").texts)

Every server has a session, a port, a log and (as root) a /dev/shm of its own.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from devkit.cache import cache_root
from devkit.checkpoint import tiny_qwen2_vl
from devkit.client import Client, Reply
from devkit.environment import Environment, engine_environment
from devkit.processes import Family, Process
from devkit.releases import release
from devkit.sharedmemory import SharedMemory, can_be_private, privately
from devkit.wheels import wheel_source

_DEFAULT_SHM_BYTES = 8 << 30
_MOST_RANKS = 16
# The modules of the engine that our checkpoints are served with.
_OUR_MODEL = {"__init__", "registry", "utils", "qwen2", "qwen2_vl", "qwen2_5_vl"}
_POLL_S = 0.1
_KILL_GRACE_S = 20.0


class ServerDied(RuntimeError):
    """The engine ended, or did not get ready; the message ends with its log."""


class EngineServer:
    """`python -m sglang.launch_server` of one engine version on CPU, in a session of its own.

    `environment` is one that exists, instead of that of a release with the `plugin` or without.
    `args` come after ours on the command line, so they win. `shm_bytes` is the size of its private
    /dev/shm; asking for one where that is impossible is an error.
    """

    def __init__(
        self,
        version: str,
        *,
        plugin: Path | None = None,
        environment: Environment | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        tp: int = 2,
        shm_bytes: int | None = None,
        ready_timeout_s: float = 180.0,
    ) -> None:
        if shm_bytes is not None and not can_be_private():
            raise PermissionError("a /dev/shm of a given size needs the right to make mount namespaces")
        self.version = version
        self.tp = tp
        self.startup_s = 0.0
        self._environment = environment or engine_environment(version, plugin=plugin)
        self._args = tuple(args)
        self._env = dict(env or {})
        self._shm_bytes = shm_bytes
        self._ready_timeout_s = ready_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: SharedMemory | None = None

    # Life

    def start(self) -> EngineServer:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.client = Client(self.url)
        logs = cache_root() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{self.version}-", suffix=".log", dir=logs)
        self.log_path = Path(name)
        command = [*dies_with_us(), *self._command(port)]
        private = can_be_private()
        if private:
            command = privately(command, self._shm_bytes or _DEFAULT_SHM_BYTES)
        else:
            shared_memory = SharedMemory.of_machine()
        began = time.monotonic()
        with closing(os.fdopen(handle, "wb")) as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ(),
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._family = Family(self.pid)
        atexit.register(self.stop)
        try:
            self._memory = SharedMemory.of_process(self.pid, self.alive) if private else shared_memory
            self._wait_until_ready(began + self._ready_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.startup_s = time.monotonic() - began
        return self

    def stop(self, grace_s: float = 1.0) -> None:
        """End every process of this server, and return when they are gone. Safe to call again.

        SIGTERM goes to the main process alone, as from a container's runtime, so that an orderly
        shutdown is what is tried; a process that remains after the grace is killed. The engine's takes 5 to
        15 s, most of it sleep, so a test that wants to see one asks for the time.
        """
        if self._process is None:
            return
        if self.alive():
            self._process.terminate()
        self._wait_until_gone(grace_s)
        if not self._wait_until_gone(_KILL_GRACE_S, kill=True):
            raise RuntimeError(f"still there after SIGKILL: {self.processes()}")
        atexit.unregister(self.stop)

    def close(self) -> None:
        """Stop, and let go of its /dev/shm: what is in it goes now."""
        self.stop()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def __enter__(self) -> EngineServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Looking at it

    def alive(self) -> bool:
        """Whether the main process runs."""
        return self._process is not None and self._process.poll() is None

    def exit_signal(self) -> str | None:
        """The name of the signal that ended the main process; None while it runs, or if there was none."""
        code = self._process.poll() if self._process is not None else None
        return signal.Signals(-code).name if code is not None and code < 0 else None

    def processes(self) -> list[Process]:
        """Every process of this server, with the title it gave itself (`sglang::scheduler_TP1`)."""
        if self._process is not None:
            self._process.poll()
        return self._family.members()

    def find(self, title: str) -> list[int]:
        """The pids of its processes whose title contains `title`."""
        return [process.pid for process in self.processes() if title in process.title]

    def kill(self, pid: int, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one of its processes, and to nothing else."""
        if pid not in {process.pid for process in self.processes()}:
            return
        try:
            os.kill(pid, sig)
        except ProcessLookupError:  # ended in between
            return

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def shm_listing(self) -> dict[str, int]:
        """Names and bytes in its /dev/shm, also after it died."""
        if self._memory is None:
            raise RuntimeError("the server was never started")
        return self._memory.listing()

    # Asking it

    def chat(self, images: Sequence[bytes], text: str, **sampling: Any) -> Reply:
        return self.client.chat(images, text, **sampling)

    def generate(self, images: Sequence[bytes], text: str, **sampling: Any) -> Reply:
        return self.client.generate(images, text, **sampling)

    def stream(self, images: Sequence[bytes], text: str, **sampling: Any) -> Iterator[Any]:
        return self.client.stream(images, text, **sampling)

    # How it is run

    def _command(self, port: int) -> list[str]:
        return [
            str(self._environment.python), "-m", "sglang.launch_server",
            "--model-path", str(tiny_qwen2_vl()), "--host", "127.0.0.1", "--port", str(port),
            "--tp", str(self.tp), "--device", "cpu", "--attention-backend", "torch_native",
            "--disable-overlap-schedule", "--mem-fraction-static", "0.3", "--max-total-tokens", "65536",
            "--skip-server-warmup", "--disable-fast-image-processor",
            # Wider than the weights: replies then do not hang on how a batch happened to be put together.
            "--dtype", "float32", *self._args,
        ]  # fmt: skip

    def _environ(self) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))
        # One entry a rank: exactly a replica's ranks at first, then at least those of all replicas.
        ranks = self.tp if release(self.version) < (0, 5, 19) else max(self.tp, _MOST_RANKS)
        models = (wheel_source(self.version) / "sglang" / "srt" / "models").iterdir()
        ours = {
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[i % len(cores)]) for i in range(ranks)),
            # Every process would import every architecture: three of fifteen CPU seconds each.
            "SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted({m.stem for m in models} - _OUR_MODEL)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # Compiling for one tiny model costs more than it gains: up to 30 s at the first image.
            "TORCHDYNAMO_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        # Not ours: what the developer's shell says about Python's paths or the engine.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SGLANG_", "MMLANE"))}
        return {**kept, **ours, **self._env}

    def _wait_until_ready(self, deadline: float) -> None:
        # /model_info answers once the schedulers have loaded; the health endpoints would generate.
        paths = ("/model_info", "/get_model_info")
        probe = Client(self.url, timeout_s=5.0)
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerDied(f"engine {self.version} ended while starting:\n{self.log()[-6000:]}")
            if any(probe.get(path).status == 200 for path in paths):
                return
            time.sleep(_POLL_S)
        raise ServerDied(f"engine {self.version} was not ready in time:\n{self.log()[-6000:]}")

    def _wait_until_gone(self, timeout_s: float, *, kill: bool = False) -> bool:
        deadline = time.monotonic() + timeout_s
        while there := self.processes():
            for process in there if kill else ():
                self.kill(process.pid)
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def dies_with_us() -> list[str]:
    """The words before a command that end it when the process that started it ends, however that does."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def free_port() -> int:
    """A port of this machine that an engine can have."""
    # Below the kernel's ephemeral range, so that no outgoing connection takes it before the engine does,
    # and low enough for the engine's other ports, which it derives by adding up to 10000.
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("found no free port")

"""An engine on several nodes: network namespaces of this machine, each with an address and a /dev/shm of its own.

    with OnNodes("0.5.18", nodes=2, tp=4) as server:
        print(server.chat([jpeg(640, 480)], "What is this?").texts)

Needs root, as in a privileged container, and iproute2. The namespaces, and with them their links, end with the
processes that hold them: nothing is left behind, however this process ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from devkit.cache import cache_root
from devkit.client import Client
from devkit.environment import engine_environment
from devkit.processes import Family, Process
from devkit.server import EngineServer, dies_with_us, free_port
from devkit.sharedmemory import privately

LINK = "eth0"  # in each node
_SHM_BYTES = 8 << 30


class Network:
    """Nodes that reach each other over a switch, and are reached from here. A context manager.

    rate: bits a second that each may send, as `tc` writes it; None: as fast as the machine can.
    """

    def __init__(self, nodes: int, rate: str | None = None) -> None:
        self.nodes = nodes
        self._rate = rate
        self._net = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        self._ending = ExitStack()

    def address(self, node: int) -> str:
        return f"{self._net}.{node + 1}"

    def __enter__(self) -> Network:
        with ExitStack() as ending:
            switch = ending.enter_context(_namespace())
            _ip(switch, "link add switch type bridge")
            _ip(switch, "link set switch up")
            self._holders = [ending.enter_context(_namespace()) for _ in range(self.nodes)]
            for node, holder in enumerate(self._holders):
                _ip(switch, f"link add port{node} type veth peer name {LINK} netns {holder}")
                _ip(switch, f"link set port{node} master switch up")
                _ip(holder, f"address add {self.address(node)}/24 dev {LINK}")
                _ip(holder, f"link set {LINK} up")
                _ip(holder, f"route add default via {self._net}.254")  # engines find their address by it
                if self._rate is not None:
                    shape = f"qdisc add dev {LINK} root tbf rate {self._rate} burst 1mb latency 50ms"
                    _run(_in(holder), "tc", *shape.split())
            here = f"mm{os.getpid()}"
            _ip(switch, f"link add here type veth peer name {here} netns {os.getpid()}")
            ending.callback(_ip, None, f"link delete {here}")  # or it goes some time after its namespace
            _ip(switch, "link set here master switch up")
            _ip(None, f"address add {self._net}.254/24 dev {here}")
            _ip(None, f"link set {here} up")
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def inside(self, node: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a node, under the same pid."""
        return [*_in(self._holders[node]), *command]

    def received(self, node: int) -> int:
        """Bytes that a node's link has received so far."""
        (link,) = json.loads(_ip(self._holders[node], f"-json -stats link show {LINK}"))
        return int(link["stats64"]["rx"]["bytes"])


def _in(holder: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder}/ns/net", "--"]


@contextmanager
def _namespace() -> Iterator[int]:
    """A network namespace, by a process that holds it."""
    command = [
        *dies_with_us(),
        "unshare",
        "--net",
        "--",
        "sh",
        "-ec",
        "ip link set lo up; echo; exec sleep infinity",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as holder:
        try:
            assert holder.stdout is not None
            if not holder.stdout.readline():
                raise PermissionError("network namespaces need root, as in a privileged container, and iproute2")
            yield holder.pid
        finally:
            holder.kill()


def _ip(holder: int | None, words: str) -> str:
    return _run([] if holder is None else _in(holder), "ip", *words.split())


def _run(prefix: Sequence[str], *command: str) -> str:
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class OnNodes(EngineServer):
    """One engine over several nodes, of which the first serves. tp: ranks of all nodes together.

    env_of: by node, what its environment has besides `env`. plain: nodes without the plugin. network: one that is
    there already.
    """

    def __init__(
        self,
        version: str,
        *,
        nodes: int = 2,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        env_of: Mapping[int, Mapping[str, str]] | None = None,
        plain: Sequence[int] = (),
        network: Network | None = None,
        **options: Any,
    ) -> None:
        self.network = network or Network(nodes)
        self._owns_network = network is None
        self._env_of = env_of or {}
        self._plain = plain
        self._others: list[subprocess.Popen[bytes]] = []
        self._families: list[Family] = []
        self.logs: list[Path] = []
        address = f"{self.network.address(0)}:{free_port()}"
        super().__init__(
            version,
            args=["--host", "0.0.0.0", "--nnodes", str(self.network.nodes), "--dist-init-addr", address, *args],
            env={"GLOO_SOCKET_IFNAME": LINK, **(env or {})},
            **options,
        )

    def __enter__(self) -> OnNodes:
        return self.start()

    def start(self) -> OnNodes:
        if self._owns_network:
            self.network.__enter__()
        try:
            super().start()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, grace_s: float = 1.0) -> None:
        super().stop(grace_s)
        for process in self._others:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its children have its group
            process.wait(60)
        self._others.clear()
        if self._process is not None:
            self._process.wait(60)  # its last thread: until then its connections are open, and need the network
        if self._owns_network:
            self.network.__exit__()

    def processes(self) -> list[Process]:
        """Of all nodes."""
        for process in self._others:
            process.poll()
        return [*super().processes(), *(member for family in self._families for member in family.members())]

    def node(self, number: int) -> list[Process]:
        """The processes of one node."""
        if number == 0:
            return super().processes()
        self._others[number - 1].poll()
        return self._families[number - 1].members()

    def _command(self, port: int, node: int = 0) -> list[str]:
        python, *words = super()._command(port)
        if node in self._plain:
            python = str(engine_environment(self.version).python)
        return self.network.inside(node, [python, *words, "--node-rank", str(node)])

    def _environ(self, node: int = 0) -> dict[str, str]:
        return {**super()._environ(), **self._env_of.get(node, {})}

    def _wait_until_ready(self, deadline: float) -> None:
        port = self.url.rpartition(":")[2]
        self.url = f"http://{self.network.address(0)}:{port}"
        self.client = Client(self.url)
        for node in range(1, self.network.nodes):
            handle, name = tempfile.mkstemp(
                prefix=f"{self.version}-node{node}-", suffix=".log", dir=cache_root() / "logs"
            )
            self.logs.append(Path(name))
            with closing(os.fdopen(handle, "wb")) as log:
                process = subprocess.Popen(
                    privately([*dies_with_us(), *self._command(free_port(), node)], _SHM_BYTES),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environ(node),
                    start_new_session=True,
                )
            self._others.append(process)
            self._families.append(Family(process.pid))
        super()._wait_until_ready(deadline)

"""Runs a Prometheus, and asks it over its HTTP API. Needs the binary `prometheus`.

with Prometheus(directory, targets=["127.0.0.1:30000"], rules="...") as prometheus:
    print(prometheus.query("up"))
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import yaml

from devkit.client import Client
from devkit.server import dies_with_us, free_port

START_S = 60.0  # it replays what it has recorded before it answers
_POLL_S = 0.05

Series = Mapping[str, Any]  # `metric`: its labels; `value` or `values`: [seconds, text of the number]


class QueryError(RuntimeError):
    """Prometheus refused a query, or what it was started with; the message is its own."""


def missing() -> str:
    """Why there is no Prometheus here; empty where there is one."""
    return "" if shutil.which("prometheus") else "no prometheus on PATH (Debian: apt-get install prometheus)"


class Prometheus:
    """Scrapes `targets` (HOST:PORT) and evaluates `rules`, the text of a file of rules, every second.

    directory: for its files; what it has recorded stays in `data` there, and a later one goes on with it.
    """

    def __init__(self, directory: Path, targets: Sequence[str] = (), rules: str = "") -> None:
        self.directory = directory
        self.url = ""
        self._targets = list(targets)
        self._rules = rules
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "prometheus.yaml"
        (self.directory / "rules.yaml").write_text(self._rules)
        often = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        engine = {"job_name": "sglang", "static_configs": [{"targets": self._targets}]}
        config.write_text(
            yaml.safe_dump({"global": often, "rule_files": ["rules.yaml"], "scrape_configs": [engine]})
        )
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *dies_with_us(),
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={self.directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def log_path(self) -> Path:
        """Its log."""
        return self.directory / "prometheus.log"

    def query(self, expression: str) -> list[Series]:
        """The series that an expression gives now. Raises QueryError."""
        found: list[Series] = self._ask("query", query=expression)["result"]
        return found

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """The same from `start` to `end`, every `step`; all in seconds. Raises QueryError."""
        found: list[Series] = self._ask("query_range", query=expression, start=start, end=end, step=step)["result"]
        return found

    def recorded(self) -> tuple[float, float]:
        """From when to when it has recorded, in seconds."""
        head = self._ask("status/tsdb")["headStats"]
        return head["minTime"] / 1000, head["maxTime"] / 1000

    def firing(self) -> list[Series]:
        """The alerts that fire now: `labels`, `annotations`."""
        return [alert for alert in self._ask("alerts")["alerts"] if alert["state"] == "firing"]

    def rules(self) -> list[Series]:
        """All rules that it evaluates: `name`, `health` (`ok`, once it could be evaluated), `lastError`."""
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def _ask(self, what: str, **parameters: object) -> Any:
        reply = Client(self.url, timeout_s=30.0).get(f"/api/v1/{what}?{urlencode(parameters)}")
        if reply.status != 200:
            raise QueryError(f"{what} {parameters}: {reply.status} {reply.body}")
        return reply.body["data"]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        probe = Client(self.url, timeout_s=5.0)
        deadline = time.monotonic() + START_S
        while probe.get("/-/ready").status != 200:
            if self._process.poll() is not None:
                raise QueryError(f"Prometheus ended while starting: {self.log_path.read_text()[-3000:]}")
            if time.monotonic() > deadline:
                raise QueryError(
                    f"Prometheus was not ready in {START_S:.0f} s: {self.log_path.read_text()[-3000:]}"
                )
            time.sleep(_POLL_S)

    def _end(self) -> None:
        """As its service does, so that it writes down what it has."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

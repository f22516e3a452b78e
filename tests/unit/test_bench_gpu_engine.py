"""The benchmark of the engine on a GPU, without either: requests, table, stand-ins, and that no process stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import distributions
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from bench.engine.asking import Unanswered
from bench.gpu_engine import __main__ as command
from bench.gpu_engine.records import Results, about, table
from bench.gpu_engine.requests import CASES, Case, Images, rounds
from bench.gpu_engine.server import PLATFORM, Server, entry_point, environ
from bench.harness.results import Record
from devkit.client import Client
from devkit.processes import Process
from mmlane.lane import Lane

INSIDE = Path(command.__file__).with_name("inside")


def made_up() -> Results:
    machine = {
        "gpu": "a GPU", "driver": "1", "torch": "2", "sglang": "0.5.16", "cores": 16,
        "memory_bytes": 1 << 30, "kernel": "6", "commit": "abc", "began": "now",
    }  # fmt: skip
    records = [
        Record("", "1 image", "off", figures={"seconds": [0.2, 0.1, 0.3]}),
        Record("", "2 images", "off", figures={"seconds": [0.2]}),
        Record("", "1 image", "lane", figures={"seconds": [0.1, 0.1, 0.1]}),
        Record("", "2 images", "lane", figures={"seconds": [0.2]}),
    ]
    texts = {
        "off": {"1 image": [["a"], ["b"], ["c"]], "2 images": [["a"]]},
        "lane": {"1 image": [["a"], ["b"], ["c"]], "2 images": [["x"]]},
    }
    lanes: dict[str, list[dict[str, Any]]] = {"off": [], "lane": [{"stats": {"tickets": 0}, "problem": None}]}
    return Results(machine, records, texts, lanes, {"off": [], "lane": ["something"]})


def test_the_table_has_medians_ratios_and_whether_texts_are_the_same() -> None:
    grid = table(made_up())
    assert grid.headings == ["request", "off, ms", "lane, ms", "lane / off", "texts"]
    assert grid.rows == [
        ["1 image", "200.0", "100.0", "0.50", "the same"],
        ["2 images", "200.0", "200.0", "1.00", "DIFFERENT"],
    ]


def test_a_mode_that_was_not_measured_has_no_figures() -> None:
    results = made_up()
    del results.records[-1]
    assert table(results).rows[1] == ["2 images", "200.0", "", "", ""]


def test_the_table_again_from_results_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up().save(tmp_path / "gpu-engine.json")
    assert command.main(["--again", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "gpu-engine.md").read_text()
    assert "| 1 image | 200.0 | 100.0 | 0.50 | the same |" in report
    for text in (report, capsys.readouterr().out):
        assert "a GPU, driver 1" in text and "pure-torch" in text
        assert "lane, new in /dev/shm afterwards: something." in text
        assert "off, new in /dev/shm afterwards: nothing." in text
    assert about(Results.load(tmp_path / "gpu-engine.json")) in report


@pytest.mark.skipif(command.lacking() is None, reason="the engine, the plugin and a GPU are here")
def test_where_something_is_missing_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"skipped: {command.lacking()}\n"
    assert not (tmp_path / "out").exists()


class Engine(BaseHTTPRequestHandler):
    """Answers a chat with as many texts as it is asked for; `asked`: all bodies."""

    asked: list[dict[str, Any]]
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        answer = json.dumps({"choices": [{"message": {"content": "hello"}}] * body["n"]}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None: ...


class Numbers(Images):
    """Numbers in place of images, which take Pillow."""

    def next(self, width: int, height: int) -> bytes:
        return f"{width}x{height}: {next(self._seeds)}".encode()


def asked_for(case: Case, status: int = 200) -> tuple[list[dict[str, Any]], list[tuple[float, list[str]]]]:
    """What an engine was asked in two rounds of a case, and what came of it."""
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (Engine,), {"asked": asked, "status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            found = list(rounds(Client(f"http://127.0.0.1:{server.server_port}"), case, Numbers(), 2))
        finally:
            server.shutdown()
            thread.join()
    return asked, found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_requests_have_their_images_and_all_differ(case: Case) -> None:
    asked, found = asked_for(case)
    assert len(asked) == 2 * case.together
    urls = [
        part["image_url"]["url"]
        for body in asked
        for part in body["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert len(urls) == len(set(urls)) == len(asked) * case.images
    assert {body["n"] for body in asked} == {case.n}
    for seconds, texts in found:
        assert seconds > 0 and texts == ["hello"] * case.n * case.together


def test_an_answer_that_is_none_ends_the_measurement() -> None:
    with pytest.raises(Unanswered, match="wanted 1 texts, found status 400"):
        asked_for(CASES[0], status=400)


def test_images_are_jpeg_and_the_same_in_every_mode() -> None:
    pytest.importorskip("PIL")
    one, other = Images(), Images()
    first = one.next(64, 48)
    assert first[:3] == b"\xff\xd8\xff"
    assert first == other.next(64, 48) != one.next(64, 48)


UTILS = "from .common import *\n"
COMMON = "def is_cuda():\n    return True\ndef is_cuda_alike():\n    return is_cuda()\n"
ASK = "from sglang.srt.utils import is_cuda, is_cuda_alike; print(is_cuda(), is_cuda_alike())"


def test_is_cuda_answers_false_to_all_who_import_it(tmp_path: Path) -> None:
    utils = tmp_path / "sglang" / "srt" / "utils"
    utils.mkdir(parents=True)
    (utils / "__init__.py").write_text(UTILS)
    (utils / "common.py").write_text(COMMON)
    for path, answer in ((f"{tmp_path}", "True True\n"), (f"{INSIDE}:{tmp_path}", "False False\n")):
        done = subprocess.run(
            [sys.executable, "-c", ASK], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.stderr) == (answer, "")


def test_the_engine_finds_the_platform_and_none_of_the_callers_settings(tmp_path: Path) -> None:
    entry_point(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    (point,) = found.entry_points
    assert (point.group, point.name, point.value) == ("sglang.srt.platforms", PLATFORM, f"{PLATFORM}:activate")
    assert (INSIDE / f"{PLATFORM}.py").exists()
    env = environ({"HOME": "/root", "MMLANE_LOG": "debug", "SGLANG_X": "1", "PYTHONPATH": "/x"}, "off", tmp_path)
    assert (env["HOME"], env["MMLANE"], env["SGLANG_PLATFORM"]) == ("/root", "off", PLATFORM)
    assert not {"MMLANE_LOG", "SGLANG_X"} & set(env)
    assert env["PYTHONPATH"].split(":")[:2] == [str(INSIDE), str(tmp_path)]


@pytest.mark.parametrize("ours", [True, False])
def test_the_numbers_of_the_servers_own_lane(ours: bool) -> None:
    there = [Process(os.getpid(), "")] if ours else []
    with Lane({"tp": 1}, capacity=1 << 20) as lane:
        found = command.settled(SimpleNamespace(processes=lambda: there))  # type: ignore[arg-type]
        assert [one["name"] for one in found] == [lane.name] * ours
    assert not ours or json.loads(json.dumps(found))[0]["stats"]["tickets"] == 0


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1:]:
    subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=sys.argv[2] == "leaves")
signal.pause()
"""


class Stubborn(Server):
    """Its processes ignore SIGTERM."""

    child = "stays"

    def _command(self, port: int) -> list[str]:
        return [sys.executable, "-c", STUBBORN, STUBBORN, self.child]

    def _wait_until_ready(self, deadline: float) -> None:
        while len(self.processes()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("child", ["stays", "leaves"])
def test_no_process_of_a_server_is_left(child: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they ignore SIGTERM, and one has left the session."""
    monkeypatch.setattr("bench.gpu_engine.server._ORDERLY_S", 0.1)
    monkeypatch.setenv("MMLANE_CACHE", str(tmp_path))
    server = Stubborn(tmp_path, "off", tmp_path)
    server.child = child
    with server:
        assert len(server.processes()) == 2
    assert server.processes() == [] and server.shm_listing() == {}
    server.close()

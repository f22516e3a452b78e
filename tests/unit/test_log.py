"""What mmlane says; failures of ours are counted, said once per cause, and never raised."""

from __future__ import annotations

import logging

import pytest

from mmlane import log


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "failures", type(log.failures)())
    monkeypatch.setattr(log, "_said", set())


def test_a_failure_is_counted_and_said_once_per_cause(caplog: pytest.LogCaptureFixture) -> None:
    for error in (OSError(28, "full"), OSError(28, "full, too"), ValueError("full"), ValueError("fuller")):
        log.failed("put", error, "it goes by segment")
    log.failed("join", ValueError("full"), "it tries again")
    assert log.failures == {"put": 4, "join": 1}
    assert caplog.messages == [
        "mmlane: put failed: OSError: [Errno 28] full; it goes by segment",
        "mmlane: put failed: ValueError: full; it goes by segment",
        "mmlane: join failed: ValueError: full; it tries again",
    ]
    assert {record.name for record in caplog.records} == {"mmlane"}
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class _Broken(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no log")


def test_nothing_is_raised_where_a_failure_cannot_be_said() -> None:
    handler = _Broken()
    logging.getLogger("mmlane").addHandler(handler)
    try:
        log.failed("put", ValueError("x"), "y")
        log.failed("put", _Mute(), "y")
    finally:
        logging.getLogger("mmlane").removeHandler(handler)
    assert log.failures == {"put": 2}


def test_what_is_ours_alone_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    with log.guarded("sweep", "nothing is swept"):
        raise ZeroDivisionError("mine")
    with pytest.raises(KeyboardInterrupt), log.guarded("sweep", "nothing is swept"):
        raise KeyboardInterrupt
    assert caplog.messages == ["mmlane: sweep failed: ZeroDivisionError: mine; nothing is swept"]
    assert log.failures == {"sweep": 1}


def test_metrics_are_told_of_every_failure_those_before_them_included(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_total", None)
    counted: list[tuple[str, int]] = []

    def total(seam: str, count: int) -> None:
        counted.append((seam, count))
        if seam == "join":
            raise OSError(28, "No space left on device")

    for seam in ("put", "put", "sweep"):
        log.failed(seam, ValueError("x"), "y")
    log.count_with(total)
    assert counted == [("put", 2), ("sweep", 1)]
    log.failed("put", ValueError("x"), "y")
    log.failed("join", ValueError("x"), "y")  # a disk that is full is no second failure
    assert counted[2:] == [("put", 1), ("join", 1)]
    assert log.failures == {"put": 3, "sweep": 1, "join": 1}


def test_a_line_before_there_is_logging(capsys: pytest.CaptureFixture[str]) -> None:
    log.print_line("not what was asked for")
    assert capsys.readouterr() == ("", "mmlane: not what was asked for\n")

"""Failures of ours: counted, said once per cause, and never raised."""

from __future__ import annotations

import logging

import pytest

from mmlane_patches import guard


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "failures", type(guard.failures)())
    monkeypatch.setattr(guard, "_said", set())


def test_a_failure_is_counted_and_said_once_per_cause(caplog: pytest.LogCaptureFixture) -> None:
    for error in (OSError(28, "full"), OSError(28, "full, too"), ValueError("full"), ValueError("fuller")):
        guard.failed("put", error, "it goes by segment")
    guard.failed("join", ValueError("full"), "it tries again")
    assert guard.failures == {"put": 4, "join": 1}
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
    guard.logger.addHandler(handler)
    try:
        guard.failed("put", ValueError("x"), "y")
        guard.failed("put", _Mute(), "y")
    finally:
        guard.logger.removeHandler(handler)
    assert guard.failures == {"put": 2}


def test_what_is_ours_alone_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    with guard.guarded("sweep", "nothing is swept"):
        raise ZeroDivisionError("mine")
    with pytest.raises(KeyboardInterrupt), guard.guarded("sweep", "nothing is swept"):
        raise KeyboardInterrupt
    assert caplog.messages == ["mmlane: sweep failed: ZeroDivisionError: mine; nothing is swept"]
    assert guard.failures == {"sweep": 1}

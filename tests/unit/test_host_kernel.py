"""Kernel features, each really tried."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mmlane import host


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_kernel_features_are_tried() -> None:
    found = {feature.name: feature for feature in host.kernel_features()}
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    for name, feature in found.items():
        assert feature.works or feature.problem, name
        if not name.startswith("MADV_POPULATE") or release >= (5, 14):
            assert feature.works, feature.problem
    assert len(found) == 10


def test_a_feature_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command, argument: 0)  # seals that do not hold
    monkeypatch.delattr(os, "posix_fallocate")
    before = descriptors()
    found = {feature.name: feature for feature in host.kernel_features()}
    assert found["F_ADD_SEALS"].problem == "a sealed memfd could be shrunk"
    assert "built without it" in found["posix_fallocate"].problem
    assert not found["F_ADD_SEALS"].works and not found["posix_fallocate"].works
    assert descriptors() == before


def test_nothing_is_left_open_or_bound() -> None:
    before = descriptors()
    host.kernel_features()
    assert descriptors() == before
    assert f"mmlane-doctor-{os.getpid()}-" not in Path("/proc/net/unix").read_text()


def test_where_nothing_works_each_feature_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr("socket.socket", refuse)
    for feature in host.kernel_features():
        assert not feature.works and "Operation not permitted" in feature.problem

"""Puts a transport of the test's into the chain of every process, before the lane."""

from __future__ import annotations

from types import ModuleType

from when_imported import when_imported


def add(chain: ModuleType) -> None:
    from file_transport import FileTransport

    small, *others = vars(chain)["CHAIN"]
    vars(chain)["CHAIN"] = (small, FileTransport, *others)


when_imported("mmlane.transport.chain", add)

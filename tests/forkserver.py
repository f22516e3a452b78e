"""Processes for tests, forked from a server that has imported what takes long.

Each is there at once instead of after seconds of imports, and shares no thread with the tests. Most tests want
`run` or `Child` of tests/lane/harness/child.py.
"""

from __future__ import annotations

from multiprocessing import get_context

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "hypothesis", "pytest", "mmlane.lane", "tests.lane.harness.peers"])

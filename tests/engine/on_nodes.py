"""A watched engine over several nodes, which are network namespaces here, and what is seen of their lanes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from devkit.nodes import OnNodes
from tests.engine import asking
from tests.engine.watching import WatchedServer

CROSSING = "features cross to the other"  # of the line that says that the link is open


class WatchedNodes(OnNodes, WatchedServer):
    """The first node serves; `tp` counts the ranks of all. Images are asked for until features cross."""

    def __enter__(self) -> WatchedNodes:
        self.start()
        return self

    def lanes(self, node: int) -> list[Any]:
        """What `mmlane status` says on a node of the lanes there."""
        command = self.network.inside(node, [sys.executable, "-m", "mmlane", "status", "--json"])
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [SimpleNamespace(**lane["stats"]) for lane in json.loads(said)]

    def lane(self, node: int) -> Any:
        (found,) = self.lanes(node)
        return found

    def open_lanes(self, ask: Callable[[], object] | None = None) -> None:
        """Ask for images until every feature crosses once; `ask` asks for one."""

        def one_image() -> None:
            assert self.generate([asking.image()], asking.TEXT).status == 200

        def is_open() -> bool:
            (ask or one_image)()
            return CROSSING in self.log()

        asking.wait_for(is_open, lambda: f"the link: {self.log()[-2000:]}")

    def all_logs(self) -> str:
        """The lines of all nodes."""
        return "".join((self.log(), *(path.read_text(errors="replace") for path in self.logs)))

    def messages(self) -> Counter[str]:
        """What mmlane has sent between ranks, by what is in a line of the probe `messages`."""
        files = self.notes.glob("*.messages")
        return Counter(line for file in files for line in file.read_text().splitlines())

    def wait_for_baseline(self) -> None:
        """Until nothing is left in the lane of any node."""

        def every() -> list[Any]:
            return [lane for node in range(self.network.nodes) for lane in self.lanes(node)]

        def at_baseline() -> bool:
            return all((lane.tickets, lane.extents, lane.used_bytes) == (0, 0, 0) for lane in every())

        asking.wait_for(at_baseline, lambda: f"the lanes to be empty: {every()}")

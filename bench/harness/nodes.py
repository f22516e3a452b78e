"""Processes on nodes that are network namespaces of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

from devkit.nodes import LINK, Network
from devkit.server import dies_with_us, free_port


def run_on_each(network: Network, module: str, *words: object) -> Any:
    """Run `python -m MODULE --end RANK WORDS... ADDRESS` on each node; what the first prints, as JSON, in the end.

    ADDRESS is where torch.distributed meets. Raises RuntimeError where one fails.
    """
    address = f"tcp://{network.address(0)}:{free_port()}"
    with ExitStack() as ending:
        ends = []
        for rank in range(network.nodes):
            command = [sys.executable, "-m", module, "--end", *map(str, (rank, *words)), address]
            end = subprocess.Popen(
                [*dies_with_us(), *network.inside(rank, command)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
            )
            ending.callback(end.kill)
            ends.append(end)
        said = [end.communicate()[0] for end in ends]
    if any(end.returncode for end in ends):
        raise RuntimeError(f"an end failed: {[end.returncode for end in ends]}")
    return json.loads(said[0].splitlines()[-1])

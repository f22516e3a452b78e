"""What the .pth line costs a Python process that has nothing to do with the engine.

Each sample is a fresh interpreter, started without site-packages, that times the line alone; beside it, as the
peer in the same interpreter, the import of one small module of the standard library.

    python -m bench.startup [--runs 100]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from bench.harness import command
from bench.harness.machine import CHECKOUT
from bench.harness.ratios import put, quartiles

PLUGIN = CHECKOUT / "plugin"
SAMPLE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
line = open(sys.argv[1] + "/mmlane.pth").read()
a = time.perf_counter()
exec(line)
b = time.perf_counter()
import colorsys
c = time.perf_counter()
print((b - a) * 1e3, (c - b) * 1e3)
"""


def sample() -> tuple[float, float]:
    """Milliseconds for the .pth line and for `import colorsys`, in one fresh interpreter."""
    command = [sys.executable, "-I", "-S", "-c", SAMPLE, str(PLUGIN)]
    line, peer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(line), float(peer)


def main() -> None:
    parser = command.parser("startup", __doc__)
    parser.add_argument("--runs", type=int, default=100)
    runs = parser.parse_args().runs
    sample()  # writes the byte code
    lines, peers = zip(*(sample() for _ in range(runs)), strict=True)
    for name, values in (("the .pth line", lines), ("import colorsys", peers)):
        tenth = statistics.quantiles(values, n=10)
        print(f"{name:16} median {statistics.median(values):.3f} ms, 90th {tenth[-1]:.3f} ms ({runs})")
    print(f"ratio of medians {statistics.median(lines) / statistics.median(peers):.2f}")
    ratio = quartiles(lines).over(quartiles(peers))
    print(put("startup", {"the .pth line over import colorsys": ratio}, command.OUT))


if __name__ == "__main__":
    main()

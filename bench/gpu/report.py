"""The results as tables, for the terminal and as Markdown, and as one picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu.measures import H2D
from bench.gpu.records import COMPARED, Results, goals
from bench.gpu.ways import LANE_PINNED, SEGMENT, TORCH_PINNED
from bench.harness import goals as wanted
from bench.harness.results import Record
from bench.harness.sizes import parse_size
from bench.harness.tables import Grid

_COLOURS = {LANE_PINNED: "#08519c", SEGMENT: "#a50f15", TORCH_PINNED: "black"}  # the others pale, behind them
_PALE = ("#c7b9a5", "#a9c4a4", "#9ecae1")


def about(results: Results) -> str:
    """The machine, and what kind of run it was, in a few lines."""
    machine = results.machine
    lines = [f"A {results.note}."] if results.note else []
    for gpu in machine["gpus"]:
        known = [str(gpu["name"])]
        if "memory_bytes" in gpu:
            known.append(f"{gpu['memory_bytes'] >> 30} GiB")
        if "driver_version" in gpu:
            link = f"PCIe {gpu['pcie.link.gen.max']} x{gpu['pcie.link.width.max']} at most"
            known += [f"driver {gpu['driver_version']}", link]
        if "numa_node" in gpu:
            known.append(f"NUMA node {gpu['numa_node']}")
        lines.append(f"GPU {gpu.get('index', '-')}: {', '.join(known)}.")
    nodes = machine["numa_nodes"]
    lines.append(
        f"torch {machine['torch']}, CUDA {machine['cuda']}, {machine['threads']} threads for copies on the host;"
        f" {machine['cores']} cores, {machine['memory_bytes'] >> 30} GiB, NUMA nodes {nodes}, Linux"
        f" {machine['kernel']}; mmlane {machine['commit']}, {machine['began']}{', quick' * machine['quick']}."
    )
    if nodes not in ("0", "unknown"):
        lines.append(
            "Several NUMA nodes: figures are best, and steady, under `numactl --cpunodebind=N --membind=N`,"
            " N the GPU's node."
        )
    lines.append("Medians (least - most). What is measured, and how: `bench/gpu/__init__.py`.")
    return "\n".join(lines)


def grids(results: Results) -> Iterator[Grid]:
    note = f" ({results.note})" if results.note else ""
    for measure, peers in COMPARED.items():
        records = [record for case in results.cases(measure) for record in results.of(measure, case)]
        if not records:
            continue
        names = list(dict.fromkeys(name for record in records for name in record.figures))
        compared = () if note else peers
        headings = ("case", "way", *names, *(f"x {peer}" for peer in compared))
        rows = [_row(results, record, names, compared) for record in records]
        yield Grid(f"{measure}{note}", headings, rows)
    yield wanted.grid(goals(results), results.note)


def _row(results: Results, record: Record[str], names: Sequence[str], peers: Sequence[str]) -> list[str]:
    if record.status != "ok":
        return [record.case, f"{record.way}: {record.problem}", *[""] * (len(names) + len(peers))]
    ratios = [results.ratio(record, peer) for peer in peers]
    return [
        record.case,
        record.way,
        *(_cell(record.figures.get(name, ())) for name in names),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
    ]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.3g} - {max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.median(values):.3g}{spread}"


def draw(results: Results, path: Path) -> list[Path]:
    """GB/s by size, where that was measured; the path. Raises ImportError without matplotlib."""
    from bench.harness import plots

    rates = {way: {parse_size(r.case): r.figures["GB/s"] for r in _measured(results, way)} for way in H2D}
    sizes = sorted({nbytes for points in rates.values() for nbytes in points})
    if not sizes:
        return []
    _, axes = plots.pyplot.subplots(figsize=(8, 4.5))
    pale = iter(_PALE)
    for way, points in rates.items():
        colour = _COLOURS.get(way) or next(pale)
        if points:
            plots.line(axes, points, label=way, color=colour, zorder=3 if way in _COLOURS else 2)
    plots.in_steps(axes, sizes, "size of the tensor")
    axes.set_ylabel("GB/s, median, least and most")
    axes.set_ylim(bottom=0)
    name = results.machine["gpus"][0]["name"]
    return [plots.write(axes, results.note or f"First copy of a tensor to the GPU: {name}", path)]


def _measured(results: Results, way: str) -> list[Record[str]]:
    return [r for r in results.records if (r.group, r.way, r.status) == ("h2d", way, "ok")]

"""The results as tables, for the terminal and as Markdown, and as one picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu.measures import H2D
from bench.gpu.records import PEERS, Record, Results, goals
from bench.gpu.ways import LANE_PINNED, SEGMENT, TORCH_PINNED
from bench.transport.cases import size
from bench.transport.tables import Grid

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
    for measure, peers in PEERS.items():
        records = [record for of_case in results.cases(measure).values() for record in of_case]
        if not records:
            continue
        names = list(dict.fromkeys(name for record in records for name in record.figures))
        compared = () if note else peers
        headings = ("case", "way", *names, *(f"x {peer}" for peer in compared))
        rows = [_row(results, record, names, compared) for record in records]
        yield Grid(f"{measure}{note}", headings, rows)
    verdicts = [(goal.text, goal.wanted, goal.found, results.note or goal.verdict) for goal in goals(results)]
    yield Grid(f"Goals{note}", ("goal", "wanted", "found", "verdict"), verdicts)


def _row(results: Results, record: Record, names: Sequence[str], peers: Sequence[str]) -> list[str]:
    if record.status != "ok":
        reason = (record.reason or "").partition("\n")[0]
        return [record.case, f"{record.way}: {record.status}, {reason}", *[""] * (len(names) + len(peers))]
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for of_case in results.cases("h2d").values() for r in of_case if r.figures]
    if not records:
        return []
    _, axes = pyplot.subplots(figsize=(8, 4.5))
    pale = iter(_PALE)
    for way in H2D:
        ours = [record for record in records if record.way == way]
        at, rates = [record.nbytes for record in ours], [record.figures["GB/s"] for record in ours]
        middle = [statistics.median(values) for values in rates]
        below = [m - min(values) for m, values in zip(middle, rates, strict=True)]
        above = [max(values) - m for m, values in zip(middle, rates, strict=True)]
        colour = _COLOURS.get(way) or next(pale)
        depth = 3 if way in _COLOURS else 2
        axes.errorbar(at, middle, yerr=[below, above], fmt="o-", capsize=3, label=way, color=colour, zorder=depth)
    axes.set_xscale("log", base=2)
    sizes = sorted({record.nbytes for record in records})
    axes.set_xticks(sizes, [size(nbytes) for nbytes in sizes])
    axes.set_xlabel("size of the tensor")
    axes.set_ylabel("GB/s, median, least and most")
    axes.set_ylim(bottom=0)
    name = results.machine["gpus"][0]["name"]
    axes.set_title(results.note or f"First copy of a tensor to the GPU: {name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    pyplot.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close()
    return [path]

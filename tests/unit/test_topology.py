"""Which ranks of a launch read what a tokenizer sends, how each is called, and who goes without a lane."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane.engine import topology  # noqa: E402
from mmlane.engine.topology import RankPlace  # noqa: E402
from tests.unit.launches import DP_ATTENTION, context, launched  # noqa: E402

# --- who is expected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"dp0": 1}),
        ({"tp_size": 4}, {"dp0": 4}),
        ({"tp_size": 2, "dp_size": 2}, {"dp0": 2, "dp1": 2}),
        ({"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, {"dp0": 2, "dp1": 2}),
        (
            {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True},
            dict.fromkeys(("dp0", "dp1", "dp2", "dp3"), 1),
        ),
        ({"tp_size": 4, "dp_size": 1, "enable_dp_attention": True}, {"dp0": 4}),
        ({"tp_size": 2, "pp_size": 2}, {"dp0": 2}),  # the second stage is sent nothing by the tokenizer
        ({"tp_size": 4, "nnodes": 2}, {"dp0": 2}),  # those on the first node
        ({"tp_size": 4, "nnodes": 4, "pp_size": 2}, {"dp0": 2}),
        ({"tp_size": 4, "nnodes": 2, "pp_size": 2}, {"dp0": 4}),
        ({**DP_ATTENTION, "nnodes": 2}, {"dp0": 2, "controller": 1}),
        ({**DP_ATTENTION, "dp_size": 4, "nnodes": 2}, {"dp0": 1, "dp1": 1, "controller": 1}),
        ({**DP_ATTENTION, "nnodes": 4}, {"dp0": 1, "controller": 1}),
        ({**DP_ATTENTION, "nnodes": 4, "pp_size": 2}, {"dp0": 2, "controller": 1}),
        ({**DP_ATTENTION, "nnodes": 2, "pp_size": 2}, {"dp0": 2, "dp1": 2}),
    ],
)
def test_which_readers_are_expected(options: dict[str, Any], wanted: dict[str, int]) -> None:
    server_args = launched(**options)
    assert topology.readers_of(server_args) == wanted
    elsewhere = topology.replicas_elsewhere(server_args)
    here = [replica for replica in range(server_args.dp_size) if replica not in elsewhere]
    assert {topology.group_of(server_args, rank) for rank in here} == wanted.keys() - {topology.CONTROLLER}


@pytest.mark.parametrize(
    ("dp_size", "dp_rank", "group"),
    [(1, None, "dp0"), (1, 3, "dp0"), (2, None, "dp0"), (2, 0, "dp0"), (2, 1, "dp1")],
)
def test_which_group_a_rank_is_of(dp_size: int, dp_rank: int | None, group: str) -> None:
    """Behind a router every engine is of size 1, and has a number all the same."""
    assert topology.group_of(launched(dp_size=dp_size), dp_rank) == group


# Launches, and for each rank of the first pipeline stage its node, its number there, and its peers.
ON_NODES: list[tuple[dict[str, Any], list[int], list[int], list[list[int]]]] = [
    ({}, [0], [0], [[0]]),
    ({"tp_size": 4}, [0] * 4, [0, 1, 2, 3], [[0, 1, 2, 3]] * 4),
    ({"tp_size": 4, "nnodes": 2}, [0, 0, 1, 1], [0, 1, 0, 1], [[0, 1, 2, 3]] * 4),
    ({"tp_size": 4, "nnodes": 4}, [0, 1, 2, 3], [0] * 4, [[0, 1, 2, 3]] * 4),
    ({"tp_size": 4, "nnodes": 4, "pp_size": 2}, [0, 0, 1, 1], [0, 1, 0, 1], [[0, 1, 2, 3]] * 4),
    ({"tp_size": 4, "nnodes": 2, "pp_size": 2}, [0] * 4, [0, 1, 2, 3], [[0, 1, 2, 3]] * 4),
    ({"tp_size": 4, "nnodes": 2, "pp_size": 4}, [0] * 4, [0, 1, 2, 3], [[0, 1, 2, 3]] * 4),  # two stages a node
    (
        {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True},
        [0] * 4,
        [0, 1, 0, 1],
        [[0, 1], [0, 1], [2, 3], [2, 3]],
    ),
    (
        {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "nnodes": 2},
        [0, 0, 1, 1],
        [0, 1, 0, 1],
        [[0, 1], [0, 1], [2, 3], [2, 3]],
    ),
    (
        {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "nnodes": 4},
        [0, 1, 2, 3],
        [0, 0, 0, 0],
        [[0, 1], [0, 1], [2, 3], [2, 3]],
    ),
    (
        {"tp_size": 6, "dp_size": 2, "enable_dp_attention": True, "nnodes": 3},
        [0, 0, 1, 1, 2, 2],
        [0, 1, 0, 0, 0, 1],
        [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3,
    ),
    (
        {"tp_size": 6, "dp_size": 2, "enable_dp_attention": True, "nnodes": 2, "pp_size": 2},
        [0] * 6,
        [0, 1, 2] * 2,
        [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3,
    ),
]


@pytest.mark.parametrize(("options", "nodes", "numbers", "peers"), ON_NODES)
def test_which_node_a_rank_is_on_and_with_whom(
    options: dict[str, Any], nodes: list[int], numbers: list[int], peers: list[list[int]]
) -> None:
    server_args = launched(**options)
    places = [RankPlace(None, 0, rank) for rank in range(server_args.tp_size)]
    assert [topology.node_of(server_args, place) for place in places] == nodes
    assert [topology.number_of(server_args, place) for place in places] == numbers
    assert [topology.peers_of(server_args, place) for place in places] == peers
    # The ranks of the first node are a lane's readers, and the controller, if it passes requests on to others.
    readers = topology.readers_of(server_args)
    sends_elsewhere = bool(topology.replicas_elsewhere(server_args))
    assert readers.pop(topology.CONTROLLER, 0) == sends_elsewhere
    assert sends_elsewhere == any(nodes[ranks[0]] for ranks in peers)
    expected = [n for count in readers.values() for n in range(count)]
    assert [number for number, node in zip(numbers, nodes, strict=True) if node == 0] == expected
    for place, ranks in zip(places, peers, strict=True):
        assert topology.is_on_several_nodes(server_args, place) == (len({nodes[rank] for rank in ranks}) > 1)
    for stage in range(1, server_args.pp_size):
        assert [topology.number_of(server_args, place._replace(pp_rank=stage)) for place in places] == (
            [None] * len(places)
        )


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({}, 1),
        ({"nnodes": 2}, 2),
        ({"nnodes": 4, "pp_size": 2}, 2),
        ({"nnodes": 2, "pp_size": 2}, 1),
        ({"nnodes": 2, "pp_size": 4}, 1),
    ],
)
def test_how_many_nodes_a_stage_is_on(options: dict[str, Any], nodes: int) -> None:
    assert topology.nodes_of_a_stage(launched(**options)) == nodes


PARALLEL = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "num_dp_ranks": 2, "attn_dp_size": 2}


@pytest.mark.parametrize("names", [["derive_attention_widths"], ["num_dp_ranks_of"]], ids=["0.5.19", "0.5.22"])
def test_the_engines_own_decision_counts_where_it_tells_it(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context(monkeypatch, **dict.fromkeys(names), get_parallel=lambda: SimpleNamespace(**PARALLEL))
    typed = launched(tp_size=4)  # and the rest was decided since
    assert topology.readers_of(typed) == {"dp0": 2, "dp1": 2}
    assert topology.group_of(typed, 1) == "dp1"
    assert topology.number_of(typed, RankPlace(1, 0, 3)) == 1


def test_before_that_the_arguments_are_what_the_engine_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    context(monkeypatch, get_parallel=lambda: SimpleNamespace(**PARALLEL))
    assert topology.readers_of(launched(tp_size=4)) == {"dp0": 4}


RanksPlace = tuple[str, int | None]  # group and number


def called(server_args: Any, place: RankPlace) -> RanksPlace:
    """How a scheduler is called in the lanes."""
    return topology.group_of(server_args, place.dp_rank), topology.number_of(server_args, place)


@pytest.mark.parametrize(
    ("options", "ranks", "wanted"),
    [
        ({}, (None, 0, 0), ("dp0", 0)),
        ({"tp_size": 4}, (None, 0, 3), ("dp0", 3)),
        ({"tp_size": 2, "dp_size": 2}, (1, 0, 0), ("dp1", 0)),
        ({"tp_size": 2, "dp_size": 2}, (1, 0, 1), ("dp1", 1)),
        (DP_ATTENTION, (0, 0, 1), ("dp0", 1)),
        (DP_ATTENTION, (1, 0, 2), ("dp1", 0)),
        (DP_ATTENTION, (1, 0, 3), ("dp1", 1)),
        ({**DP_ATTENTION, "dp_size": 4}, (3, 0, 3), ("dp3", 0)),
        ({"tp_size": 2, "pp_size": 2}, (None, 1, 1), ("dp0", None)),
        ({"tp_size": 2, "pp_size": 2, "dp_size": 2}, (1, 1, 0), ("dp1", None)),
    ],
)
def test_which_number_a_rank_has(
    options: dict[str, Any], ranks: tuple[int | None, int, int], wanted: RanksPlace
) -> None:
    assert called(launched(**options), RankPlace(*ranks)) == wanted


# What each release calls the facts that it has made of the arguments; 0.5.18 and older changed the arguments.
TOLD_BY: dict[str, tuple[str, ...]] = {
    "0.5.18": (),
    "0.5.19": ("derive_attention_widths",),
    "0.5.22": ("derive_attention_widths", "num_dp_ranks_of"),
}


@pytest.mark.parametrize("release", TOLD_BY)
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("tp", "dp", "pp"), [(1, 1, 1), (4, 1, 1), (4, 2, 1), (2, 1, 3), (4, 4, 1), (4, 2, 2)])
def test_every_expected_reader_is_one_rank(
    release: str, attention: bool, tp: int, dp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a lane would never open, or two ranks would dispute a number."""
    facts = {"tp_size": tp, "dp_size": dp, "enable_dp_attention": attention, "pp_size": pp}
    if names := TOLD_BY[release]:
        parallel = SimpleNamespace(**facts, num_dp_ranks=dp, attn_dp_size=dp if attention else 1)
        context(monkeypatch, **dict.fromkeys(names), get_parallel=lambda: parallel)
    server_args = launched() if names else launched(**facts)
    if attention:  # one world of `tp` ranks, of which neighbours make an attention group
        ranks = [(tp_rank // (tp // dp), tp_rank) for tp_rank in range(tp)]
    else:
        ranks = [(dp_rank, tp_rank) for dp_rank in range(dp) for tp_rank in range(tp)]
    places = [
        called(server_args, RankPlace(dp_rank, stage, tp_rank))
        for stage in range(pp)
        for dp_rank, tp_rank in ranks
    ]
    assert [number for _, number in places[len(ranks) :]] == [None] * (pp - 1) * len(ranks)
    expected = topology.readers_of(server_args).items()
    assert sorted(places[: len(ranks)]) == [(group, n) for group, count in expected for n in range(count)]


@pytest.mark.parametrize("dp_rank", [None, 0, 1])
def test_where_a_scheduler_stands(dp_rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 0.5.20 its arguments tell, whatever else they say; from then on the context does."""
    ranks = {"dp_rank": dp_rank, "pp_rank": 2, "tp_rank": 3}
    given = {"server_args": None, "port_args": None, "gpu_id": 7, "moe_ep_rank": 7, "attn_cp_rank": 7, **ranks}
    assert topology.place_of(given) == RankPlace(dp_rank, 2, 3)
    context(monkeypatch, get_parallel=lambda: SimpleNamespace(**ranks))
    assert topology.place_of({"server_args": None, "port_args": None}) == RankPlace(dp_rank, 2, 3)


def test_reading_who_takes_part_needs_no_engine() -> None:
    assert "sglang" not in sys.modules
    modules = "mmlane.engine.launch, mmlane.engine.scheduler, mmlane.engine.topology"
    program = f"import sys, {modules}; print(*{{'sglang', 'torch'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

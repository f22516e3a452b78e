"""Which processes of a launch read what a tokenizer sends, and where a rank stands among them."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

CONTROLLER = "controller"  # the reader group of the process that passes requests on to replicas


class RankPlace(NamedTuple):
    """Where a scheduler stands: its data-parallel replica, its pipeline stage, its rank among the TP ranks."""

    dp_rank: int | None
    pp_rank: int
    tp_rank: int


def group_of(server_args: Any, dp_rank: int | None) -> str:
    """The reader group of a scheduler: the ranks of one data-parallel replica, also inside DP-attention."""
    count, _ = _groups(server_args)
    return f"dp{dp_rank or 0 if count > 1 else 0}"  # a router numbers engines that know nothing of each other, too


def number_of(server_args: Any, place: RankPlace) -> int | None:
    """A rank's number among those of its group and node; None for a later pipeline stage."""
    if place.pp_rank:
        return None
    of_a_node = _of_a_node(server_args)
    return place.tp_rank - max(peers_of(server_args, place)[0], place.tp_rank - place.tp_rank % of_a_node)


def node_of(server_args: Any, place: RankPlace) -> int:
    """The number of the node that a rank of the first pipeline stage is on, as the engine lays them out."""
    return place.tp_rank // _of_a_node(server_args)


def peers_of(server_args: Any, place: RankPlace) -> list[int]:
    """The ranks of the first pipeline stage that receive what this one does, by their numbers in the engine."""
    size = _groups(server_args)[1]  # ranks of an attention group are neighbours
    first = place.tp_rank - place.tp_rank % size
    return list(range(first, first + size))


def is_on_several_nodes(server_args: Any, place: RankPlace) -> bool:
    """Whether the ranks that receive what this one does are on several nodes."""
    peers = peers_of(server_args, place)
    return len({peer // _of_a_node(server_args) for peer in peers}) > 1


def _of_a_node(server_args: Any) -> int:
    """How many ranks of one pipeline stage are on one node."""
    return int(_given(server_args).tp_size) // nodes_of_a_stage(server_args)


def readers_of(server_args: Any) -> dict[str, int]:
    """Reader group -> its number of readers on the first node, where tokenizers are.

    Those are ranks of the first pipeline stage; and the controller, if it passes requests on to other nodes.
    """
    count, size = _groups(server_args)
    elsewhere = replicas_elsewhere(server_args)
    readers = {}
    for replica in filter(lambda replica: replica not in elsewhere, range(count)):
        first = _first_of(server_args, replica)
        readers[group_of(server_args, replica)] = min(first + size, _of_a_node(server_args)) - first
    return {**readers, CONTROLLER: 1} if elsewhere else readers


def replicas_elsewhere(server_args: Any) -> list[int]:
    """The data-parallel replicas whose requests the controller sends to other nodes (DP-attention)."""
    count, _ = _groups(server_args)
    return [replica for replica in range(count) if _first_of(server_args, replica) >= _of_a_node(server_args)]


def _first_of(server_args: Any, replica: int) -> int:
    """The TP rank that receives a replica's requests."""
    return int(replica * _groups(server_args)[1] % _given(server_args).tp_size)  # 0: TP groups of their own


def _groups(server_args: Any) -> tuple[int, int]:
    """How many reader groups there are, and the ranks in each."""
    given = _given(server_args)
    if hasattr(_context(), "num_dp_ranks_of"):  # from 0.5.22 on: replicas and attention groups are counted apart
        return given.num_dp_ranks, given.tp_size // given.attn_dp_size
    return given.dp_size, given.tp_size // given.dp_size if given.enable_dp_attention else given.tp_size


def _given(server_args: Any) -> Any:
    """What knows sizes: from 0.5.19 on the context has what the engine made of the arguments that were typed."""
    context = _context()
    has_them = hasattr(context, "num_dp_ranks_of") or hasattr(context, "derive_attention_widths")
    return context.get_parallel() if has_them else server_args


def _context() -> Any:
    return sys.modules.get("sglang.srt.runtime_context")


def place_of(given: dict[str, Any]) -> RankPlace:
    """Where a scheduler stands, from the arguments that it was made with; from 0.5.21 on the context has it."""
    if "dp_rank" in given:
        return RankPlace(given["dp_rank"], given["pp_rank"], given["tp_rank"])
    parallel = sys.modules["sglang.srt.runtime_context"].get_parallel()
    return RankPlace(parallel.dp_rank, parallel.pp_rank, parallel.tp_rank)


def has_local_control(server_args: Any) -> bool:
    """Whether replicas of DP-attention get control messages on their own; older releases have no such flag."""
    flag = getattr(_given(server_args), "enable_dp_attention_local_control_broadcast", False)
    return bool(flag) and _groups(server_args)[0] > 1


def nodes_of_a_stage(server_args: Any) -> int:
    """How many nodes the ranks of one pipeline stage are on, as the engine lays them out."""
    return max(int(server_args.nnodes) // int(server_args.pp_size), 1)


def carrying_groups(receiver: Any) -> list[Any]:
    """The CPU process groups over which a `Scheduler` or `SchedulerRequestReceiver` was sent its work requests.

    With DP-attention those are its attention TP and CP groups, otherwise the TP group; a group of one is none.
    """
    sizes = getattr(receiver, "ps", receiver)
    # 0.5.17 and 0.5.18 may decide for DP-attention after parsing, and ask this; it is asked where they ask it.
    get_parallel = vars(sys.modules[type(receiver).__module__]).get("get_parallel")
    decided = receiver.server_args if get_parallel is None else get_parallel()
    if decided.enable_dp_attention:
        candidates = [
            (sizes.attn_tp_size, receiver.attn_tp_cpu_group),
            (sizes.attn_cp_size, receiver.attn_cp_cpu_group),
        ]
    else:
        candidates = [(sizes.tp_size, receiver.tp_cpu_group)]
    return [group for size, group in candidates if size > 1]

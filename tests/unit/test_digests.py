"""The comparison of digests that every test of the engine ends with: it must miss nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from tests.engine.digests import compare
from tests.engine.watching import PROBES

FEATURE = torch.arange(100, dtype=torch.bfloat16)
RANKS = range(2)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The probe that runs in the processes of an engine; no engine is here."""
    monkeypatch.syspath_prepend(str(PROBES))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setenv("NOTES", str(tmp_path))
    yield importlib.import_module("probe_digests")
    del sys.modules["probe_digests"], sys.modules["when_made"]


def request(rid: str, *values: Any) -> Any:
    items = [SimpleNamespace(feature=value, precomputed_embeddings=None) for value in values]
    return SimpleNamespace(rid=rid, mm_inputs=SimpleNamespace(mm_items=items))


def send(probe: Any, sent: Any) -> None:
    def _send_one_request(self: object, tokenized_obj: Any) -> None:
        if tokenized_obj.rid == "refused":
            raise OSError("refused")

    probe.sending(_send_one_request)(None, sent)


def take(probe: Any, rank: int, taken: Any) -> None:
    scheduler = SimpleNamespace(tp_rank=rank, pp_rank=0, dp_rank=None)
    probe.handling(lambda self, recv_req: None)(scheduler, taken)


def test_equal_digests_are_no_fault(probe: Any, tmp_path: Path) -> None:
    sent = request("a", FEATURE, [FEATURE, torch.zeros(0)], torch.tensor(1.0))
    send(probe, sent)
    for rank in RANKS:
        take(probe, rank, request("text"))
        take(probe, rank, sent)
    found = compare(tmp_path)
    assert (found.requests, found.digests) == (1, 4)
    found.verify(ranks=2, answered=1)
    with pytest.raises(AssertionError):
        found.verify(ranks=2, answered=2)


def corrupted() -> torch.Tensor:
    feature = FEATURE.clone()
    feature[50] += 1
    return feature


WRONG: dict[str, Callable[[], Any]] = {
    "a value": corrupted,
    "the shape": lambda: FEATURE.reshape(10, 10),
    "the type": lambda: FEATURE.view(torch.int16),
    "a pointer": object,
    "nothing": lambda: None,
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("wrong", [(0,), (1,), (0, 1)], ids=str)
def test_a_difference_is_a_fault(probe: Any, tmp_path: Path, what: str, wrong: tuple[int, ...]) -> None:
    send(probe, request("a", FEATURE, FEATURE))
    for rank in RANKS:
        take(probe, rank, request("a", FEATURE, WRONG[what]() if rank in wrong else FEATURE))
    found = compare(tmp_path)
    assert found.faults
    with pytest.raises(AssertionError):
        found.verify(ranks=2, answered=0, undisturbed=False)


def test_a_request_that_lost_a_feature(probe: Any, tmp_path: Path) -> None:
    lost = type("RefusedInputs", (), {})
    send(probe, request("a", FEATURE))
    for rank in RANKS:
        take(probe, rank, SimpleNamespace(rid="a", mm_inputs=lost()))
    found = compare(tmp_path)
    assert found.lost == ["a"]
    found.verify(ranks=2, answered=0, losing=1)
    with pytest.raises(AssertionError):
        found.verify(ranks=2, answered=0)
    take(probe, 0, SimpleNamespace(rid="b", mm_inputs=lost()))
    take(probe, 1, request("b", FEATURE))
    assert compare(tmp_path).faults


def test_what_was_not_sent_and_what_was_not_taken(probe: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="refused"):
        send(probe, request("refused", FEATURE))
    assert compare(tmp_path).unsent == {"refused": "OSError('refused')"}
    compare(tmp_path).verify(ranks=2, answered=0)
    send(probe, request("a", FEATURE))
    assert compare(tmp_path).untaken == ["a"]
    take(probe, 0, request("a", FEATURE))
    with pytest.raises(AssertionError):  # there are two ranks
        compare(tmp_path).verify(ranks=2, answered=1)
    take(probe, 1, request("a", FEATURE))
    compare(tmp_path).verify(ranks=2, answered=1)
    send(probe, request("b", object()))
    for rank in RANKS:
        take(probe, rank, request("b", FEATURE))
    assert compare(tmp_path).wrapped == ["b"]
    with pytest.raises(AssertionError):
        compare(tmp_path).verify(ranks=2, answered=0)


def test_a_rank_that_was_killed(probe: Any, tmp_path: Path) -> None:
    for rid in ("a", "b"):
        send(probe, request(rid, FEATURE))
        take(probe, 0, request(rid, FEATURE))
    take(probe, 1, request("a", FEATURE))
    (tmp_path / "1.jsonl").write_text('{"what": "took", "rid": "b", "ra')
    found = compare(tmp_path)
    assert (found.requests, found.uneven, found.faults) == (2, [0], [])
    found.verify(ranks=2, answered=0, undisturbed=False)
    with pytest.raises(AssertionError):
        found.verify(ranks=2, answered=0)


def test_ranks_that_handle_in_another_order(probe: Any, tmp_path: Path) -> None:
    for rid in ("a", "b"):
        send(probe, request(rid, FEATURE))
    for rank, order in ((0, "ab"), (1, "ba")):
        for rid in order:
            take(probe, rank, request(rid, FEATURE))
    assert len(compare(tmp_path).faults) == 1

"""A scheduler as each release has it: our functions find its parts under the names of that release."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mmlane.engine import prompts, scheduler


@dataclass(frozen=True)
class Receiver:
    """The engine's from 0.5.13 on, which is frozen."""

    input_blocker: Any


def test_the_receiver_is_the_scheduler_or_what_it_has() -> None:
    older, receiver = SimpleNamespace(input_blocker=None), Receiver(None)
    newer = SimpleNamespace(request_receiver=receiver)
    assert scheduler.receiver_of(older) is older
    assert scheduler.receiver_of(newer) is receiver
    for found in (older, receiver):
        scheduler.put_before_broadcast(found, "gate")
        assert found.input_blocker == "gate"


def test_an_answer_goes_by_the_channel_that_there_is() -> None:
    sent: list[Any] = []
    sender = SimpleNamespace(send_output=lambda *words: sent.append(words))
    older = SimpleNamespace(send_to_tokenizer=sender)
    scheduler.answer_tokenizer(older, "request", "output")
    scheduler.answer_tokenizer(SimpleNamespace(ipc_channels=older), "request", "output")
    assert sent == [("output", "request")] * 2


def test_only_a_scheduler_that_sleeps_has_to_be_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", SimpleNamespace(POLLIN=1))
    registered: list[Any] = []
    poller = SimpleNamespace(register=lambda *words: registered.append(words))
    for sleeper in (None, SimpleNamespace(poller=poller)):
        scheduler.wake_when_readable(SimpleNamespace(idle_sleeper=sleeper), 7)
    assert registered == [(7, 1)]


@pytest.mark.parametrize("sees", [None, False, True])
def test_the_engine_looks_for_pointers_where_it_can(sees: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    mm_utils, unwrapped = ModuleType("mm_utils"), list[Any]()
    vars(mm_utils)["unwrap_shm_features"] = unwrapped.append
    if sees is not None:
        vars(mm_utils)["has_shm_features"] = lambda requests: sees
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.mm_utils", mm_utils)
    assert scheduler.may_hold_pointers([]) is (sees is not False)
    scheduler.unwrap("request")
    assert unwrapped == ["request"]


def test_the_flat_lists_of_a_prompt() -> None:
    request = SimpleNamespace(image_data=["a", "b"], video_data=[["a"]], audio_data=[], mm_hashes=None)
    assert prompts.lists_of_a_prompt(request) == {"image_data": ["a", "b"]}
    assert prompts.sample_count(request) == 1
    request.parallel_sample_num = 3
    assert prompts.sample_count(request) == 3

"""Compares what the probe of that name has noted in the processes of an engine: was what was taken what was sent?

`probes/probe_digests.py` says what a note is. A process that was killed may have left half a line: no note.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a request has got in the place of its inputs when a feature is lost, below 0.5.19 and from there on.
LOST = ("RefusedInputs", "MMInputsProcessError")


@dataclass
class Comparison:
    """What became of the requests with features; `faults` has one line for each thing that is not as it must be.

    ranks: how many have handled requests, by replica. requests, digests: how many requests, and tensors of them,
    every rank has taken as they were sent. lost: requests of which every rank says that a feature is lost. unsent:
    those that could not be sent, and why. untaken: those that were sent, and that no rank has handled. uneven:
    replicas of which one rank has handled fewer requests than another. wrapped: requests that came to be sent with
    something else than tensors.
    """

    faults: list[str] = field(default_factory=list)
    ranks: dict[int, int] = field(default_factory=dict)
    requests: int = 0
    digests: int = 0
    lost: list[str] = field(default_factory=list)
    unsent: dict[str, str] = field(default_factory=dict)
    untaken: list[str] = field(default_factory=list)
    uneven: list[int] = field(default_factory=list)
    wrapped: list[str] = field(default_factory=list)

    def verify(self, *, ranks: int, answered: int, losing: int = 0, undisturbed: bool = True) -> None:
        """Raise `AssertionError` unless every feature was taken as it was sent, and all of them were looked at.

        ranks: of each replica. answered: how many requests with images were: as many must have been compared.
        losing: how many may have lost a feature. undisturbed: with the plugin, and no process was killed.
        """
        assert not self.faults, self
        assert self.requests >= answered, (answered, self)
        assert len(self.lost) <= losing, self
        if undisturbed:
            assert not (self.untaken or self.uneven or self.wrapped), self
            assert set(self.ranks.values()) <= {ranks}, self


Taken = list[dict[str, Any]]


def compare(directory: Path) -> Comparison:
    """Read all notes in a directory."""
    found = Comparison()
    sent: dict[str, list[str]] = {}
    replicas: dict[int, dict[int, Taken]] = {}
    for note in _notes(directory):
        if note["what"] == "sent":
            if note["rid"] in sent:
                found.faults.append(f"{note['rid']}: sent twice")
            sent[note["rid"]] = note["values"]
        elif note["what"] == "unsent":
            found.unsent[note["rid"]] = note["error"]
        else:
            replicas.setdefault(note["replica"], {}).setdefault(note["rank"], []).append(note)
    found.ranks = {replica: len(ranks) for replica, ranks in replicas.items()}
    taken: set[str] = set()
    for replica, ranks in replicas.items():
        longest = max(ranks.values(), key=len)
        for rank, notes in ranks.items():
            found.faults += _differences(f"replica {replica}, rank {rank}", notes, longest)
            if len(notes) < len(longest):
                found.uneven.append(replica)
        for note in longest:
            taken.add(note["rid"])
            _judge(found, note, sent)
    found.untaken = [rid for rid in sent if rid not in taken and rid not in found.unsent]
    return found


def _notes(directory: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(directory.glob("*.jsonl")):
        yield from (json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n"))


def _differences(where: str, notes: Taken, longest: Taken) -> Iterator[str]:
    """Ranks handle the same requests in the same order; one that was killed has only begun to."""
    for one, other in zip(notes, longest, strict=False):
        for key in ("rid", "values", "inputs"):
            if one[key] != other[key]:
                yield f"{where}: {key} of {one['rid']} {one[key]}, on another rank {other[key]} of {other['rid']}"
                return


def _judge(found: Comparison, note: dict[str, Any], sent: dict[str, list[str]]) -> None:
    rid, values = note["rid"], sent.get(note["rid"], [])
    if note["inputs"] in LOST:
        found.lost.append(rid)
    elif any(value.split()[1].startswith("<") for value in values):
        found.wrapped.append(rid)
    elif note["values"] != values:
        found.faults.append(f"{rid}: sent {values}, taken {note['values']}")
    elif values:
        found.requests += 1
        found.digests += len(values)

"""Two `sglang.Engine`s in one process, a spawned child of one that has a resource tracker. A test runs:

    PYTHON_OF_AN_ENGINE embedded.py OUTPUT PORT IMAGE,... ARGUMENTS_OF_THE_ENGINE...

PORT is that of the second engine; IMAGE the path of a file. OUTPUT gets a JSON object:

answers: of each engine, the tokens for each image. lanes: of each engine, with the plugin, what its lane has
counted. code: with which the child ended. kept: whether the parent's own shared memory was there after that, as it
was. left: what else was in /dev/shm.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from dataclasses import asdict
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>Describe it."
OWN = b"what the parent keeps"
WAIT_S = 60.0


def lane_of(engine: Any) -> Any:
    ours: Any = sys.modules.get("mmlane.transport.tokenizer_side")
    return None if ours is None else getattr(engine.tokenizer_manager, ours.SIDE).producer.lane


def ask(engine: Any, picture: str) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": 8}
    return engine.generate(prompt=PROMPT, image_data=[picture], sampling_params=sampling)["output_ids"]


def settled(lane: Any) -> dict[str, Any] | None:
    """What a lane has counted, when its last ticket has been released, or in a minute."""
    if lane is None:
        return None
    until = time.monotonic() + WAIT_S
    while lane.stats().tickets and time.monotonic() < until:
        time.sleep(0.005)
    counted: dict[str, Any] = asdict(lane.stats())
    return counted


def serve(output: str, port: str, pictures: list[str], arguments: list[str]) -> None:
    """The child: the engines answer in turn."""
    import sglang
    from sglang.srt.server_args import prepare_server_args

    both = arguments, [*arguments, "--port", port]
    engines = [sglang.Engine(server_args=prepare_server_args(words)) for words in both]
    for engine in engines:
        ask(engine, pictures[0])
        if (lane := lane_of(engine)) is not None:
            assert lane.wait_open(WAIT_S)
    in_turn = [[ask(engine, picture) for engine in engines] for picture in pictures]
    found = {
        "answers": [list(answers) for answers in zip(*in_turn, strict=True)],
        "lanes": [settled(lane_of(engine)) for engine in engines],
    }
    Path(output).write_text(json.dumps(found))
    # One engine ends the children of its process, the other's too, whose watchdog would take that for a crash.
    for engine in engines:
        if (watchdog := getattr(engine.tokenizer_manager, "_subprocess_watchdog", None)) is not None:
            watchdog.stop()
    for engine in engines:
        engine.shutdown()


def names() -> set[str]:
    """Of what is in /dev/shm."""
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def main() -> None:
    output, port, pictures, *arguments = sys.argv[1:]
    own = SharedMemory(create=True, size=len(OWN))  # from here on this process has a tracker, and its children too
    assert own.buf is not None
    own.buf[: len(OWN)] = OWN
    before = names()
    spawning = multiprocessing.get_context("spawn")
    child = spawning.Process(target=serve, args=(output, port, pictures.split(","), arguments))
    child.start()
    child.join()
    found = json.loads(Path(output).read_text()) if Path(output).exists() else {}
    kept = own.name in names() and bytes(own.buf[: len(OWN)]) == OWN
    left = sorted(names() - before)
    own.close()
    own.unlink()
    tracker: Any = resource_tracker._resource_tracker
    tracker._stop()  # it says what it has found left, and the test reads that
    Path(output).write_text(json.dumps({**found, "code": child.exitcode, "kept": kept, "left": left}))


if __name__ == "__main__":
    main()

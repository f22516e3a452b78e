"""Where a lane begins to pay: python -m bench.inline

One tensor at a time from a producer to two ranks, the way the engine sends requests: pickled over ZeroMQ to the
first rank, which unpickles it and broadcasts it, pickled again, over gloo to the other. Once with the tensor
inside, once with its bytes (as message codecs of newer releases have them), once with its ticket. Both ranks
read every byte and say so; the time is that until both have.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import zmq

from bench.harness import command, tables
from bench.harness.tables import Grid
from mmlane.lane import Invitation, Lane, Reader

RANKS = 2
WAYS = ("tensor", "bytes", "lane")
SIZES = [1 << power for power in range(10, 22)]  # bytes


def broadcast(message: Any, rank: int) -> Any:
    """As the engine's `broadcast_pyobj`: the length, then the pickle, both as tensors."""
    if rank == 0:
        raw = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(raw)]), 0)
        dist.broadcast(raw, 0)
        return message
    length = torch.zeros(1, dtype=torch.long)
    dist.broadcast(length, 0)
    raw = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(raw, 0)
    return pickle.loads(raw.numpy().tobytes())


def serve(rank: int, directory: str, invitation: Invitation, done: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    reader = Reader("dp0", rank)
    reader.join(invitation)
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        if rank == 0:
            socket.connect(f"ipc://{directory}/requests")
        done.send("ready")
        while True:
            value = broadcast(socket.recv_pyobj() if rank == 0 else None, rank)
            if value is None:
                return
            done.send(float(opened(value, reader).sum()))
            del value


def opened(value: Any, reader: Reader) -> torch.Tensor:
    if isinstance(value, bytes):
        return reader.take(value, "cow")
    if isinstance(value, dict):
        return torch.frombuffer(bytearray(value["data"]), dtype=value["dtype"]).reshape(value["shape"])
    tensor: torch.Tensor = value
    return tensor


def sent(tensor: torch.Tensor, way: str, lane: Lane) -> Any:
    if way == "lane":
        return lane.put(tensor)
    if way == "bytes":
        return {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "data": tensor.numpy().tobytes()}
    return tensor


def measure(rounds: int) -> dict[int, dict[str, float]]:
    """Size in bytes -> way -> median seconds."""
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    found: dict[int, dict[str, float]] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        Lane({"dp0": RANKS}, idle=3600) as lane,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as socket,
    ):
        socket.bind(f"ipc://{directory}/requests")
        pipes = [spawn.Pipe() for _ in range(RANKS)]
        ranks = [
            spawn.Process(target=serve, args=(rank, directory, lane.invitation, theirs))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for ours, _ in pipes:
            assert ours.recv() == "ready"
        lane.wait_open()
        for size in SIZES:
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(rounds):
                tensor = torch.full((size // 4,), float(number))
                for way, seconds in times.items():
                    began = time.perf_counter()
                    socket.send_pyobj(sent(tensor, way, lane))
                    for ours, _ in pipes:
                        assert ours.recv() == float(tensor.sum())
                    seconds.append(time.perf_counter() - began)
            found[size] = {way: statistics.median(seconds) for way, seconds in times.items()}
        socket.send_pyobj(None)
        for process in ranks:
            process.join()
    return found


def main() -> None:
    parser = command.parser("inline", __doc__)
    parser.add_argument("--rounds", type=int, default=300)
    found = measure(parser.parse_args().rounds)
    rows = []
    for size, of in found.items():
        ratios = [of["lane"] / of[way] for way in WAYS[:2]]
        rows.append([f"{size >> 10}", *(f"{of[way] * 1e6:.0f}" for way in WAYS), *(f"{r:.2f}" for r in ratios)])
    headings = ["KiB", *(f"{way}, us" for way in WAYS), "lane / tensor", "lane / bytes"]
    tables.render([Grid("One tensor to two ranks", headings, rows)], tables.console())


if __name__ == "__main__":
    main()

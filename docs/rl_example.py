"""One process renders images for a loop of rollouts, and workers answer them: python docs/rl_example.py

Each image is asked about several times, as policy optimisation with groups of samples does it. It is copied once,
whatever the number of samples, and each sample goes to one worker.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import torch

from mmlane.lane import Invitation, Lane, Reader, Refused, Reservation

WORKERS = 3
IMAGES = 4
SAMPLES = 6  # of each image


def work(name: str, invitation: Invitation, inbox: Connection) -> None:
    """A worker: answer what comes, until None does. A message is a ticket, or the image itself."""
    with Reader(name, 0) as reader:
        reader.join(invitation)
        while (message := inbox.recv()) is not None:
            image = reader.take(message, mode="view") if isinstance(message, bytes) else torch.from_numpy(message)
            reward = float(image.max())  # in place of a model
            del image  # releases the ticket
            inbox.send(reward)


def send(copy: Reservation | Refused, image: torch.Tensor, inbox: Connection) -> None:
    """Send a worker a ticket; where the lane had no room, the image itself, which is slower and always works."""
    ticket = copy if isinstance(copy, Refused) else copy.publish()
    inbox.send(image.numpy() if isinstance(ticket, Refused) else ticket)


def main() -> None:
    """The process that renders."""
    spawn = multiprocessing.get_context("spawn")
    names = [f"worker-{number}" for number in range(WORKERS)]
    # A group for each worker: a ticket is for one group, so that each worker can get tickets of its own.
    with Lane(readers=dict.fromkeys(names, 1), capacity=256 << 20) as lane:
        inboxes, processes = [], []
        for name in names:
            here, there = spawn.Pipe()
            process = spawn.Process(target=work, args=(name, lane.invitation, there))
            process.start()
            inboxes.append(here)
            processes.append(process)
        if not lane.wait_open(timeout=60):
            raise SystemExit("not all workers have joined within a minute")

        for number in range(IMAGES):
            image = torch.full((3, 720, 1280), float(number))
            copy = lane.copy(image)
            turns = [inboxes[sample % WORKERS] for sample in range(SAMPLES)]
            for inbox in turns:
                send(copy, image, inbox)
            if not isinstance(copy, Refused):
                copy.close()  # its room is free when the last ticket is released
            print(f"image {number}: rewards {[inbox.recv() for inbox in turns]}")

        stats = lane.stats()
        print(f"{stats.puts} tickets, {stats.copied_bytes} bytes copied")
        for inbox in inboxes:
            inbox.send(None)
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()

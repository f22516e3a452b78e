"""ipc_lock: the file whose lock guards the ranks' acknowledgement counter is where no other user can touch it.

Why: ranks lock /tmp/shm_wr_lock.lock while they count up, and open it so that it is emptied. Any user of /tmp can
have put a link there, and the file that it leads to is emptied; or a file of theirs, and no rank can acknowledge.
Upstream: none; 0.5.18 counts on the GPU, without a file.
How: the constant with that path is replaced by one in a directory of our own (`private_directory`). The first
process of an engine that decides tells its children by MMLANE_IPC_LOCK, so that all lock one file even when a
second look would find something else. Engines of one user may share it: it is held for the time that a number is
counted up.
When it can go: with the oldest supported engine at 0.5.18.
"""

from __future__ import annotations

import os
from pathlib import Path

from mmlane.compat import matrix
from mmlane.log import print_line
from mmlane.patching import Target
from mmlane_patches.private_directory import candidates, checked, make_ours

VARIABLE = "MMLANE_IPC_LOCK"
NAME = "shm_wr_lock.lock"


class PrivateLock:
    """The path of a file in a directory of our own, looked at again, or made anew, whenever it is used.

    What cleans temporary directories may take it from a server that has been idle for days.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __fspath__(self) -> str:
        make_ours(self.file.parent)
        return str(self.file)

    def __str__(self) -> str:
        return str(self.file)


def private_lock(engines: str) -> PrivateLock | str:
    """What takes the place of the engine's path: `engines` itself where no directory can be had."""
    inherited = os.environ.get(VARIABLE)
    if inherited == engines:
        return engines  # and it has been said
    problems = []
    if inherited:
        try:
            return PrivateLock(checked(Path(inherited).parent) / NAME)
        except OSError as error:  # of another user, who started us; or no longer ours
            print_line(
                f"wanted the lock file of this engine's other processes, {inherited}, found that it cannot be "
                f"used ({error}); this one takes another, so with CUDA IPC the pool may fill up: start the "
                "engine anew"
            )
    for directory in candidates():
        try:
            lock = PrivateLock(checked(directory) / NAME)
        except OSError as error:
            problems.append(str(error))
            continue
        os.environ[VARIABLE] = str(lock.file)
        return lock
    os.environ[VARIABLE] = engines
    print_line(
        f"wanted a directory that is ours alone for a lock file, found none ({'; '.join(problems)}); so with CUDA "
        f"IPC the engine locks {engines}, and other users of this machine can stop its requests, or empty a file "
        f"of yours by a link; set TMPDIR to a directory of yours, or silence this with MMLANE_DISABLE=ipc_lock"
    )
    return engines


PROXY = "sglang.srt.utils.cuda_ipc_transport_utils.CudaIpcTensorTransportProxy"

SPEC = matrix().spec(
    "ipc_lock",
    targets=(
        Target(
            module="sglang.srt.utils.cuda_ipc_transport_utils",
            name="SHM_LOCK_FILE",
            signature="'/tmp/shm_wr_lock.lock'",
            replace=private_lock,
            before="0.5.18",
        ),
    ),
    # All that open the lock file.
    relies_on=(
        f"{PROXY}.reconstruct_on_target_device",
        f"{PROXY}._copy_slice_tensor_to_target",
        f"{PROXY}._acknowledge_consumption",
    ),
)

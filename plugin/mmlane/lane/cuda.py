"""The calls that a reader makes to CUDA, through torch, and the streams that were made current there."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import wraps
from typing import Any

import torch

_PORTABLE = 0x01  # cudaHostRegisterPortable
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_streams: dict[Any, None] = {}  # that were made current since `watch_streams`, in any thread


def watch_streams() -> None:
    """Note from now on every stream that is made current through torch.cuda; torch does not list them."""
    set_stream = torch.cuda.set_stream
    if getattr(set_stream, "_notes_streams", False):
        return

    @wraps(set_stream)
    def noting(stream: Any) -> None:
        set_stream(stream)
        if stream is not None:
            _streams.setdefault(stream)

    noting._notes_streams = True  # type: ignore[attr-defined]
    torch.cuda.set_stream = noting
    enter = getattr(torch.cuda.Stream, "__enter__", None)  # from 2.7 on; `with stream:` does not call set_stream
    if enter is not None:

        def entering(stream: Any) -> Any:
            _streams.setdefault(stream)
            return enter(stream)

        torch.cuda.Stream.__enter__ = entering  # type: ignore[method-assign]


class Cuda:
    """The calls that a reader makes to one device, through torch: nothing but these.

    Raises ValueError where torch has no such device.
    """

    def __init__(self, index: int) -> None:
        if not index < torch.cuda.device_count():
            raise ValueError(
                f"device cuda:{index}: torch {torch.__version__} finds {torch.cuda.device_count()} here"
            )
        self.index = index

    def enter(self) -> None:
        """For a thread of ours: use this device, and do not disturb a graph capture in another thread."""
        torch.cuda.set_device(self.index)
        mode = ctypes.c_int(_RELAXED)
        with suppress(OSError, AttributeError):  # no libcuda: nothing of this would have worked
            ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory, which must be mapped to write. Raises RuntimeError with CUDA's reason."""
        self._call("cudaHostRegister", address, nbytes, _PORTABLE)

    def unregister(self, address: int) -> None:
        """Undo `register`. Raises RuntimeError with CUDA's reason."""
        self._call("cudaHostUnregister", address)

    @staticmethod
    def _call(name: str, *arguments: int) -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = getattr(cudart, name)(*arguments)
        if int(error) != 0:
            raise RuntimeError(f"{name}: {cudart.cudaGetErrorString(error)}")

    def synchronize(self) -> None:
        """Wait until the device has done all that it was told."""
        torch.cuda.synchronize(self.index)

    def current_stream(self) -> Any:
        """The stream that the calling thread's work goes to now."""
        return torch.cuda.current_stream(self.index)

    def default_stream(self) -> Any:
        return torch.cuda.default_stream(self.index)

    def record(self, stream: Any) -> Any | None:
        """An event behind all that the stream has been given; None while it is being captured into a graph."""
        with torch.cuda.stream(stream):
            if torch.cuda.is_current_stream_capturing():
                return None
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            # A capture that has begun since has the event in its graph, and a query would break it.
            return None if torch.cuda.is_current_stream_capturing() else event

    def streams(self) -> list[Any]:
        """The streams of this device that have been made current since `watch_streams`."""
        return [stream for stream in list(_streams) if stream.device_index == self.index]

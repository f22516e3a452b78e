"""The wire form of a tensor in a lane: plain bytes, so that pickle, msgpack and a socket all carry it unchanged.

A ticket says where its tensor lies and what it looks like. Its digest lies in the lane's directory as long as the
ticket is out, so a reader can tell a good ticket from one that was changed, has ended, or was never issued (5).
"""

from __future__ import annotations

import struct
from hashlib import blake2s
from math import prod
from typing import NamedTuple

import torch

from mmlane.lane.errors import MalformedTicket

_MAGIC = b"mml1"
_HEAD = struct.Struct("<4sBBBIQQQ")  # magic, lengths of name and dtype, dimensions, slot, serial, offset, nbytes
DIMENSIONS = 255  # of a tensor, at most: their number is one byte

_NAMES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
# The dtypes that travel, by name: those of the list that this torch has.
DTYPES: dict[bytes, torch.dtype] = {name.encode(): getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHAPES = [struct.Struct(f"<{dimensions}Q") for dimensions in range(DIMENSIONS + 1)]


class Content(NamedTuple):
    """What a ticket says: the lane, the place of the tensor in it (bytes), a number unique there, dtype, shape."""

    lane: str
    slot: int
    serial: int
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def unsupported(tensor: torch.Tensor) -> str:
    """Why a tensor cannot travel by lane; empty when it can."""
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return f"{type(tensor).__name__}: only plain tensors travel by lane"
    if not tensor.is_cpu:
        return f"a tensor on {tensor.device}: only CPU tensors travel by lane"
    if tensor.layout is not torch.strided or tensor.dtype not in NAMES or tensor.is_nested:
        return f"{tensor.dtype}, {tensor.layout}: only dense tensors of ordinary dtypes travel by lane"
    if tensor.dim() > DIMENSIONS:
        return f"{tensor.dim()} dimensions: at most {DIMENSIONS} travel by lane"
    try:
        is_there = not tensor.numel() or (tensor.data_ptr() and _ends_within_its_storage(tensor))
    except RuntimeError as error:  # one inside of torch.vmap, torch.func.grad, ...
        return f"a tensor that has no memory ({error}): only plain tensors travel by lane"
    return "" if is_there else "a tensor whose memory is gone, or never was: only plain tensors travel by lane"


def _ends_within_its_storage(tensor: torch.Tensor) -> bool:
    """Not so if the storage was resized: torch itself would read beyond it."""
    end = tensor.storage_offset() + tensor.numel()
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps) + 1
    return end * tensor.itemsize <= tensor.untyped_storage().nbytes()


def write(content: Content) -> bytes:
    """The ticket for a content."""
    name, dtype = content.lane.encode(), NAMES[content.dtype]
    dimensions = len(content.shape)
    head = _HEAD.pack(
        _MAGIC,
        len(name),
        len(dtype),
        dimensions,
        content.slot,
        content.serial,
        content.offset,
        content.nbytes,
    )
    return b"".join((head, name, dtype, _SHAPES[dimensions].pack(*content.shape)))


def read(ticket: bytes) -> Content:
    """What a ticket says. Raises MalformedTicket unless it is one and is consistent in itself."""
    if not isinstance(ticket, bytes):
        raise MalformedTicket(f"a ticket is bytes, as `Lane.put` returned it; this is {type(ticket).__name__}")
    try:
        magic, name_size, dtype_size, dimensions, slot, serial, offset, nbytes = _HEAD.unpack_from(ticket)
        name_end = _HEAD.size + name_size
        dtype_end = name_end + dtype_size
        name = ticket[_HEAD.size : name_end].decode()
        dtype = DTYPES[ticket[name_end:dtype_end]]
        shape = _SHAPES[dimensions].unpack(ticket[dtype_end:])
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise MalformedTicket(f"not a ticket, or damaged: {len(ticket)} bytes, {error}") from error
    if magic != _MAGIC:
        raise MalformedTicket(f"not a ticket: it begins with {magic!r}, a ticket with {_MAGIC!r}")
    if prod(shape) * dtype.itemsize != nbytes:
        raise MalformedTicket(f"damaged ticket: {dtype} of shape {shape} has not {nbytes} bytes")
    return Content(name, slot, serial, offset, nbytes, dtype, shape)


def digest(ticket: bytes) -> int:
    """What the directory holds for a ticket: 64 bits, never 0."""
    return int.from_bytes(blake2s(ticket, digest_size=8).digest(), "little") or 1

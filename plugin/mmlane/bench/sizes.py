"""Numbers of bytes, in words and out of them."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_LEAST = 256  # so that each of 32 tensors has whole words of 8 bytes


def size(nbytes: int) -> str:
    """Bytes in the largest unit that divides them."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def parse_size(text: str) -> int:
    """`64K`, `16MiB`, `1 GiB`, `4096`; raises ValueError for what is no multiple of 256 bytes."""
    plain = text.replace(" ", "").lower().removesuffix("b").removesuffix("i")
    units = {"k": KIB, "m": MIB, "g": GIB}
    try:
        nbytes = int(plain.rstrip("kmg")) * units.get(plain[-1:], 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a size; wanted something like 64K, 16M or 1G") from None
    if nbytes < _LEAST or nbytes % _LEAST:
        raise ValueError(f"{text}: wanted a multiple of {_LEAST} bytes")
    return nbytes

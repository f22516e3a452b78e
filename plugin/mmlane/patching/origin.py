"""Where an object in an engine's module comes from: the engine, or another plugin that has taken its place.

Other plugins replace objects as we do, or by the hooks of the engine's own plugin system.
"""

from __future__ import annotations

import sys
from types import CellType, ModuleType
from typing import Any


def plain(value: Any) -> Any:
    """The function of a static or class method; anything else as it is."""
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def wrapped(function: Any) -> Any:
    """What a function calls in turn, or None.

    The engine's hooks, and others', set `__wrapped__` on a plain replacement too, which never calls what it names.
    """
    inner = getattr(function, "__wrapped__", None)
    held = _held(function)
    return inner if held is None or any(value is inner for value in held) else None


def _held(function: Any) -> list[Any] | None:
    """What a function holds from the scope that it was defined in; None for what is no such function."""
    cells = getattr(function, "__closure__", None)
    return None if cells is None else [cell.cell_contents for cell in cells if cell != CellType()]


def replaced_by(value: Any, module: ModuleType) -> str | None:
    """Which code put `value` in an engine module in place of the engine's own object; None: none did."""
    function = plain(value)
    engine = module.__name__.partition(".")[0]
    if isinstance(function, type):
        home = function.__module__
        return None if home.partition(".")[0] == engine else f"{home}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if code is None:
        return f"a {type(function).__name__} object" if callable(function) else repr(function)
    # A decorator copies __module__ and __qualname__, so only the code tells where a function comes from.
    for name, candidate in list(sys.modules.items()):
        if isinstance(candidate, ModuleType) and vars(candidate).get("__file__") == code.co_filename:
            if name.startswith(f"{engine}.srt.plugins") and name != module.__name__:
                # The engine's own way to hook; whose hook it is tells what its wrapper holds.
                functions = [held for held in _held(function) or () if hasattr(held, "__qualname__")]
                homes = [(held.__module__ or name, held.__qualname__) for held in functions]
                theirs = [f"{home}.{qualname}" for home, qualname in homes if home.partition(".")[0] != engine]
                return ", ".join(theirs) or name
            if name.partition(".")[0] == engine:
                return None
            return f"{name}:{code.co_qualname if sys.version_info >= (3, 11) else code.co_name}"
    return None if code.co_filename == getattr(module, "__file__", None) else code.co_filename

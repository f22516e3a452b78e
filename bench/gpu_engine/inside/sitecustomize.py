"""Python imports this in every process of an engine that bench.gpu_engine starts: `is_cuda()` answers False there.

`sglang.srt.utils.common` defines the function; all other modules import it from there, after this has replaced it.
"""

from __future__ import annotations

import sys
from typing import Any

_ASKED = "sglang.srt.utils.common"


class _Imports:
    """Meta path finder: finds nothing itself, and comes in when the module has been run."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != _ASKED:
            return None
        import importlib.util

        sys.meta_path.remove(self)  # the next line asks the meta path, too
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            module.is_cuda = lambda: False

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Imports())

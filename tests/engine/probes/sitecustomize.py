"""Python imports this in every process of an engine under test; it runs the probes that $PROBES names.

A probe is a module of this directory, without its `probe_`: digests, held, ...
"""

from __future__ import annotations

import importlib
import os

for name in os.environ.get("PROBES", "").split():
    importlib.import_module(f"probe_{name}")

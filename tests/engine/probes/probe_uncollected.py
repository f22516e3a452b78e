"""While there is a file $NOTES/uncollected, Python's collector does not run in the tokenizer.

What is let go of then does not wait for the collector to pass. It is switched off and on when a request is sent.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from when_made import before_each_send


def switch(manager: Any) -> None:
    if Path(os.environ["NOTES"], "uncollected").exists():
        gc.disable()
    else:
        gc.enable()


before_each_send(switch)

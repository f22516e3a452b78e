"""The main module of an engine that `mmlane serve` starts: the startup hook, where no .pth file brings it.

multiprocessing runs the main module of a process again in each child that it spawns, as `__mp_main__`, before it
unpickles what the child is to do. So the hook is there before the engine is: in this process, in its children and
in theirs. What the engine starts as a command of its own has no hook; no release does so with a process that
handles requests.
"""

import importlib.util
import runpy
import sys

from mmlane import PREFIX, bootstrap

LAUNCHER = f"{bootstrap.ENGINE}.launch_server"
NO_ENGINE = 3  # exit code, as the doctor's


def _check_engine() -> None:
    spec = importlib.util.find_spec(bootstrap.ENGINE)
    if spec is None or spec.origin is None:  # or a mere directory of that name
        why = f"this Python ({sys.executable}) cannot import {bootstrap.ENGINE}"
        print(f"{PREFIX}no engine: {why}; run the mmlane of an environment that has it", file=sys.stderr)
        raise SystemExit(NO_ENGINE)


if __name__ == "__main__":
    _check_engine()
    sys.argv[0] = "mmlane serve"  # in the usage of releases that do not name it themselves
if __name__ in ("__main__", "__mp_main__"):
    bootstrap.install()
    # Without `alter_sys`: this module stays `sys.modules["__main__"]`, where children read what they have to run.
    runpy.run_module(LAUNCHER, run_name=__name__)

"""`python -m tools.gpu`: all that needs a GPU, in parts of four minutes at most, and one JSON file about them.

It runs in a checkout, with a Python 3.10 or newer that has torch for CUDA. What else is needed goes into a virtual
environment over that Python's own packages, in build/gpu: from the package index, or without a network from a
folder of wheels (`--wheels DIRECTORY`), which `python -m tools.gpu --bundle DIRECTORY` fills elsewhere.

The parts are tests/gpu, each measure of bench.gpu, and, where sglang is installed, bench.gpu_engine. A part that
has passed on this commit is not run again: if the time is up, begin again, and it goes on. build/gpu/gpu.json has
for each its command, exit status and seconds; what it printed, its figures and its tables lie beside that. Exit
status 1: a part failed; 0 where there is no GPU, which is said.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.machine import CHECKOUT, commit

BUILD = CHECKOUT / "build" / "gpu"
LIMIT_S = 240
BUNDLE_MIB = 60
MEASURES = ("contexts", "h2d", "concurrent", "registration", "first byte")  # of bench.gpu
# What tests and benchmarks use beside torch, which is the machine's own.
PACKAGES = (
    *("hypothesis", "msgpack", "numpy", "prometheus_client", "psutil"),
    *("pytest", "pytest-timeout", "pytest-xdist"),
)
# What that torch is built for, as wheels are named.
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")


def parts() -> dict[str, list[str]]:
    """By name, the arguments for Python."""
    out = str(BUILD / "out")
    made = {"tests": ["-m", "pytest", "tests/gpu", "-n", "0", "-q", "--timeout", str(LIMIT_S)]}
    for name in MEASURES:
        made[name] = ["-m", "bench.gpu", "--only", name, "--out", f"{out}/{name.replace(' ', '-')}"]
    made["engine"] = ["-m", "bench.gpu_engine", "--out", f"{out}/engine"]
    return made


def bundle(directory: Path, python: str) -> int:
    """Fill a folder with wheels: mmlane, and what its tests and benchmarks need beside torch."""
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(directory), str(CHECKOUT)], check=True)
    (own,) = directory.glob("sglang_mmlane-*.whl")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    words = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    subprocess.run([*pip, "download", *words, "--dest", str(directory), str(own), *PACKAGES], check=True)
    sizes = {wheel.name: wheel.stat().st_size for wheel in directory.glob("*.whl")}
    total = sum(sizes.values()) / (1 << 20)
    print(f"{len(sizes)} wheels, {total:.1f} MiB, in {directory}")
    if total > BUNDLE_MIB:
        largest = ", ".join(sorted(sizes, key=sizes.__getitem__, reverse=True)[:5])
        print(f"more than {BUNDLE_MIB} MiB; the largest: {largest}", file=sys.stderr)
        return 1
    return 0


def environment(wheels: Path | None, torch: str) -> Path:
    """The Python of a virtual environment with mmlane and the rest, over the packages that lie beside torch."""
    place = BUILD / "venv"
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        make = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)]
        subprocess.run(make, check=True)
        # By a path: that Python may have its packages in a virtual environment itself.
        (own,) = place.glob("lib/python*/site-packages")
        (own / "torch.pth").write_text(f"{torch}\n")
        source = [str(CHECKOUT), *PACKAGES]
        if wheels is not None:
            source = ["--no-index", "--find-links", str(wheels), "sglang-mmlane", *PACKAGES]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", str(python)]
        subprocess.run([*pip, "install", *source], check=True)
        (place / ".ready").touch()
    return python


def run(python: Path, names: Sequence[str], *, again: bool) -> int:
    """Run parts, and note each as soon as it is over."""
    path = BUILD / "gpu.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    here = commit()
    if known.get("commit") != here or again:
        known = {"commit": here, "parts": {}}
    for name in names:
        if known["parts"].get(name, {}).get("status") == 0:
            print(f"{name}: passed before")
            continue
        arguments, log = parts()[name], BUILD / f"{name.replace(' ', '-')}.log"
        began = time.monotonic()
        with log.open("w") as out:
            try:
                status: int | str = subprocess.run(
                    [python, *arguments], cwd=CHECKOUT, stdout=out, stderr=subprocess.STDOUT, timeout=LIMIT_S
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"not within {LIMIT_S} s"
        seconds = round(time.monotonic() - began, 1)
        known["parts"][name] = {"command": ["python", *arguments], "status": status, "seconds": seconds}
        path.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {'passed' if status == 0 else f'failed ({status}), see {log}'}, {seconds:.0f} s")
    return 0 if all(known["parts"][name]["status"] == 0 for name in names) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="those to run (all)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, instead of the package index")
    parser.add_argument("--bundle", type=Path, help="fill such a folder, and end")
    parser.add_argument("--python", default="3.12", help="for a bundle: the version there (3.12)")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    options = parser.parse_args(arguments)
    if options.bundle is not None:
        return bundle(options.bundle, options.python)
    question = "import torch; torch.cuda.is_available() and print(torch.__file__, torch.cuda.get_device_name(0))"
    found = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    file, _, card = found.stdout.strip().partition(" ")
    if not card:
        print(f"skipped: {sys.executable} has no torch that sees a GPU", file=sys.stderr)
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    python = environment(options.wheels, str(Path(file).parents[1]))
    unknown = set(options.parts) - parts().keys()
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts())}")
    print(card)
    return run(python, options.parts or list(parts()), again=options.again)


if __name__ == "__main__":
    sys.exit(main())

"""Ways to have mmlane in a Python environment, each with the commands that a person would type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "sglang-mmlane"
LAYERS = "00_layers.pth"  # before mmlane.pth, as packages of the environment itself would be


@dataclass(frozen=True)
class Place:
    """An empty directory for an environment, and what there is to install: mmlane's wheel, and what others need.

    below: directories whose packages the environment has: the engine, then what mmlane requires.
    """

    root: Path
    wheel: Path
    checkout: Path
    below: tuple[Path, ...]


class Way:
    """mmlane by `pip install WHEEL` into a virtual environment, until a subclass says otherwise."""

    has_hook = True  # whether the startup hook runs in this environment

    def __init__(self, place: Place) -> None:
        self.place = place
        self.environ: dict[str, str] = {}
        self.python = self.create()
        (self.packages() / LAYERS).write_text("".join(f"{directory}\n" for directory in place.below))

    def create(self) -> Path:
        return virtual_environment(self.place.root / "venv", Path(sys.executable))

    def packages(self) -> Path:
        """The directory of packages that the environment has of its own."""
        (found,) = (self.place.root / "venv" / "lib").glob("python*/site-packages")
        return found

    def install(self) -> None:
        pip(self.python, "install", "--no-deps", str(self.place.wheel))

    def uninstall(self) -> None:
        pip(self.python, "uninstall", "--yes", PACKAGE)

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python in it, without what the developer's shell says."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MMLANE", "PYTHON", "SGLANG"))}
        return subprocess.run(
            [*self.prefix(), str(self.python), *words],
            env={**kept, **self.environ, **environ},
            cwd=self.place.root,
            capture_output=True,
            text=True,
            check=False,
        )

    def prefix(self) -> list[str]:
        """The words before a command that run it as another user."""
        return []

    def files(self) -> set[str]:
        """All that is there, but for the byte code of packages that are still there."""
        return {str(p.relative_to(self.place.root)) for p in self.place.root.rglob("*") if not _is_byte_code(p)}


class Wheel(Way):
    pass


class Editable(Way):
    def install(self) -> None:
        pip(self.python, "install", "--no-deps", "--editable", str(self.place.checkout))


class Sdist(Way):
    def install(self) -> None:
        built = self.place.root.parent / "sdist"
        uv("build", "--sdist", "--out-dir", str(built), str(self.place.checkout))
        (sdist,) = built.glob("*.tar.gz")
        pip(self.python, "install", "--no-deps", str(sdist))


class Uv(Way):
    def install(self) -> None:
        uv("pip", "install", "--python", str(self.python), "--no-deps", str(self.place.wheel))

    def uninstall(self) -> None:
        uv("pip", "uninstall", "--python", str(self.python), PACKAGE)

    def files(self) -> set[str]:
        return super().files() - {"venv/.lock"}  # uv's own


class Target(Way):
    """Found by PYTHONPATH: Python reads no .pth files there, and pip cannot uninstall it."""

    has_hook = False

    def install(self) -> None:
        pip(self.python, "install", "--no-deps", "--target", str(self.directory()), str(self.place.wheel))
        self.environ = {"PYTHONPATH": str(self.directory())}

    def uninstall(self) -> None:
        shutil.rmtree(self.directory())

    def directory(self) -> Path:
        return self.place.root / "target"


class User(Way):
    """`pip install --user`, of a Python that is no virtual environment."""

    def create(self) -> Path:
        self.environ = {"PYTHONUSERBASE": str(self.place.root / "user")}
        self.packages().mkdir(parents=True)
        return original(Path(sys.executable))

    def packages(self) -> Path:
        return user_packages(self.place)

    def install(self) -> None:
        self.succeed("-m", "pip", "--quiet", "install", "--user", "--no-deps", str(self.place.wheel))

    def uninstall(self) -> None:
        self.succeed("-m", "pip", "--quiet", "uninstall", "--yes", PACKAGE)

    def succeed(self, *words: str) -> None:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr


class SystemSite(Way):
    """In a virtual environment that sees packages outside of it, where the engine is."""

    def create(self) -> Path:
        self.environ = {"PYTHONUSERBASE": str(self.place.root / "user")}
        self.packages().mkdir(parents=True)
        python = virtual_environment(self.place.root / "venv", Path(sys.executable), outside=True)
        (own,) = (self.place.root / "venv" / "lib").glob("python*/site-packages")
        (own / "another.py").touch()  # else pip takes the empty directory away, too
        return python

    def packages(self) -> Path:
        return user_packages(self.place)


class OnPython(Way):
    """With another Python than that of the tests, and what mmlane requires as it is published for that."""

    def __init__(self, place: Place, interpreter: Path) -> None:
        self.interpreter = interpreter
        super().__init__(replace(place, below=place.below[:1]))

    def create(self) -> Path:
        python = virtual_environment(self.place.root / "venv", self.interpreter)
        pip(python, "install", *(requires(PACKAGE) or ()))
        return python


class OtherUser(Way):
    """Installed by root, used by a user who may write nothing there. All users may run the interpreter."""

    def __init__(self, place: Place, interpreter: Path) -> None:
        self.interpreter = interpreter
        super().__init__(place)

    def create(self) -> Path:
        return virtual_environment(self.place.root / "venv", self.interpreter)

    def prefix(self) -> list[str]:
        return AS_NOBODY


AS_NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]
WAYS: dict[str, type[Way]] = {
    "wheel": Wheel,
    "target": Target,
    "editable": Editable,
    "sdist": Sdist,
    "uv": Uv,
    "user": User,
    "system site": SystemSite,
}
QUICK = ("wheel", "target")


def user_packages(place: Place) -> Path:
    """Where PYTHONUSERBASE=ROOT/user puts packages."""
    return place.root / "user" / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"


def virtual_environment(root: Path, interpreter: Path, *, outside: bool = False) -> Path:
    """An empty virtual environment without pip, which sees packages of the system with `outside`; its Python."""
    options = ["--without-pip", *(["--system-site-packages"] if outside else [])]
    subprocess.run([original(interpreter), "-m", "venv", *options, root], check=True)
    return root / "bin" / "python"


def original(interpreter: Path) -> Path:
    """The interpreter that a virtual environment was made with; one that is in none, itself."""
    code = "import sys; print(sys._base_executable)"
    found = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


def pip(python: Path, *words: str) -> None:
    """Run the tests' own pip for another environment."""
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "--quiet", *words], check=True)


def uv(*words: str) -> None:
    """Run the uv of the tests' environment."""
    subprocess.run([sys.executable, "-m", "uv", "--quiet", "--no-config", *words], check=True)


def link_requirements(directory: Path) -> Path:
    """What mmlane requires, as it is installed for the tests, in a directory of links."""
    directory.mkdir()
    for found in closure(PACKAGE):
        tops = {file.parts[0] for file in found.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__", "bin"}:
            source = Path(str(found.locate_file(top)))
            if source.suffix != ".pth" and not (directory / top).exists():
                (directory / top).symlink_to(source)
    return directory


def closure(package: str) -> Iterator[Distribution]:
    """The distributions that a package requires, directly or not, without itself."""
    waiting, seen = [package], {package}
    while waiting:
        for line in distribution(waiting.pop()).requires or ():
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and requirement.name not in seen:
                seen.add(requirement.name)
                waiting.append(requirement.name)
                yield distribution(requirement.name)


def _is_byte_code(path: Path) -> bool:
    return path.name == "__pycache__" or path.parent.name == "__pycache__"

"""What modules keep for their process is what docs/design.md says, with a reason for each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PACKAGES = (CHECKOUT / "plugin/mmlane", CHECKOUT / "patches/mmlane_patches")
# Made once, at the import, and not changed after it.
FIXED = {"logger", "app", "hookspec", "hookimpl", "__all__", "libc", "_brief"}
UPPER_CASE = {"mmlane.import_hook.WATCH"}  # which does change


def kept(file: Path, module: str) -> Iterator[str]:
    """Module-level names that a function rebinds, or that hold an object in lower case: constants are in upper."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    rebound = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        for target in targets:
            if not isinstance(target, ast.Name):
                continue  # an attribute, or several constants in one line
            assert isinstance(statement, ast.Assign | ast.AnnAssign)
            holds = isinstance(statement.value, ast.Call | ast.List | ast.Dict | ast.Set)
            lower = target.id.strip("_").islower()
            if target.id in rebound or (holds and lower) or f"{module}.{target.id}" in UPPER_CASE:
                yield target.id


def test_the_table_in_the_documentation_is_complete() -> None:
    found = set()
    for package in PACKAGES:
        for file in package.rglob("*.py"):
            module = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            found |= {f"{module}.{name}" for name in kept(file, module) if name not in FIXED}
    table = (CHECKOUT / "docs/design.md").read_text(encoding="utf-8").partition("**State is in the sides.**")[2]
    told = set()
    for row in re.findall(r"^\| (`.*?) \|", table.partition("\n\n**")[0], re.MULTILINE):
        module = ""
        for name in re.findall(r"`([\w.]+)`", row):
            module = name.rpartition(".")[0] or module
            told.add(f"{module}.{name.rpartition('.')[2]}")
    assert told == found

"""`python -m tools.fingerprints`: record anew the bodies that patches rely on, after a person has read them."""

from __future__ import annotations

import argparse
import json

from mmlane import compat
from tools import bodies
from tools.releases import our_patches, release


def refresh() -> bodies.Record:
    """The record as the releases of the table say it now."""
    wanted = bodies.all_paths(our_patches())
    found = {}
    for version in compat.matrix().engines:
        source = release(version).source
        assert source is not None
        found[version] = bodies.bodies(source, wanted)
    return bodies.summarize(found)


def changes(before: bodies.Record, now: bodies.Record) -> list[str]:
    """One line for each body that is not as recorded on some release: what is to be read."""
    lines = []
    for version in compat.matrix().engines:
        told = bodies.differences(bodies.recorded(before, version), bodies.recorded(now, version))
        lines += [f"{version}: {path}: {what}" for path, what in told.items()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.fingerprints", description=__doc__)
    parser.parse_args()
    before = bodies.load() if bodies.RECORD.is_file() else {}
    now = refresh()
    bodies.RECORD.write_text(json.dumps(now, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    print(*changes(before, now) or ["nothing has changed"], sep="\n")


if __name__ == "__main__":
    main()

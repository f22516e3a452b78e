"""The devkit's command line: `python -m devkit --help`."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devkit.cache import cache_root
from devkit.checkpoint import tiny_qwen2_vl
from devkit.client import Client
from devkit.environment import engine_environment
from devkit.images import jpeg
from devkit.nodes import OnNodes
from devkit.server import EngineServer, ServerDied
from devkit.wheels import wheel_source
from mmlane.compat import matrix


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    engine_args: list[str] = []
    if "--" in words:
        cut = words.index("--")
        words, engine_args = words[:cut], words[cut + 1 :]
    options = _parser().parse_args(words)
    if options.command == "env":
        return _env(options.versions or _supported(), options.plugin)
    if options.command == "serve":
        return _serve(options, engine_args)
    if options.command == "ask":
        return _ask(options)
    if options.command == "wheels":
        return _wheels(options.versions or _supported())
    return _clean()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m devkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="build environments ahead of time")
    env.add_argument("versions", nargs="*", metavar="VERSION", help="default: every supported release")
    env.add_argument("--plugin", type=Path, metavar="WHEEL")
    serve = commands.add_parser("serve", help="run a server until Ctrl-C; engine options go after --")
    serve.add_argument("version", metavar="VERSION")
    serve.add_argument("--plugin", type=Path, metavar="WHEEL")
    serve.add_argument("--tp", type=int, default=2)
    serve.add_argument("--nodes", type=int, default=1, help="network namespaces that the ranks are spread over")
    serve.add_argument("--shm-bytes", type=int, metavar="N", help="size of its private /dev/shm")
    ask = commands.add_parser("ask", help="send images to a running server")
    ask.add_argument("url", metavar="URL")
    ask.add_argument("--images", type=int, default=1, metavar="N")
    ask.add_argument("--n", type=int, default=1, metavar="N", help="samples")
    ask.add_argument("--size", default="640x480", metavar="WxH")
    wheels = commands.add_parser("wheels", help="unpack engine wheels for reading")
    wheels.add_argument("versions", nargs="*", metavar="VERSION", help="default: every supported release")
    commands.add_parser("clean", help="delete the cache")
    return parser


def _supported() -> list[str]:
    return [str(version) for version in matrix().engines]


def _env(versions: Sequence[str], plugin: Path | None) -> int:
    tiny_qwen2_vl()
    for version in versions:
        began = time.monotonic()
        environment = engine_environment(version, plugin=plugin)
        print(f"{version:<14}{time.monotonic() - began:6.1f} s  {environment.python}", flush=True)
    return 0


def _serve(options: argparse.Namespace, engine_args: Sequence[str]) -> int:
    # An orderly end for SIGTERM as well: the servers are in sessions of their own and would stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given: dict[str, Any] = {"plugin": options.plugin, "args": engine_args, "tp": options.tp}
    given["shm_bytes"] = options.shm_bytes
    several = options.nodes > 1
    server = (
        OnNodes(options.version, nodes=options.nodes, **given)
        if several
        else EngineServer(options.version, **given)
    )
    try:
        with server:
            print(f"{server.url}  ready in {server.startup_s:.1f} s, log in {server.log_path}", flush=True)
            while server.alive():
                time.sleep(0.5)
    except ServerDied as died:
        print(died, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    print(f"the engine ended:\n{server.log()[-4000:]}", file=sys.stderr)
    return 1


def _ask(options: argparse.Namespace) -> int:
    width, _, height = options.size.partition("x")
    images = [jpeg(int(width), int(height), seed) for seed in range(options.images)]
    began = time.monotonic()
    reply = Client(options.url).chat(images, "What do you see?", n=options.n, max_tokens=16)
    took = time.monotonic() - began
    if reply.status != 200:
        print(f"{reply.status} after {took:.2f} s: {reply.body}", file=sys.stderr)
        return 1
    for text in reply.texts:
        print(text)
    print(f"{took:.2f} s", file=sys.stderr)
    return 0


def _wheels(versions: Sequence[str]) -> int:
    for version in versions:
        print(f"{version:<14}{wheel_source(version)}", flush=True)
    return 0


def _clean() -> int:
    root = cache_root()
    if root.exists():
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())

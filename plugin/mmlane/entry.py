"""The driver: one start per process, whichever trigger comes first.

Triggers: the entry point `sglang.srt.plugins` (`register`), and the startup hook, the .pth line that watches for
the import of the engine (`mmlane.bootstrap`). The engine swallows what an entry point raises, so what must stop it
is a `SystemExit`.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mmlane_patches
from mmlane import PREFIX, compat, engine, flags, import_hook, settings
from mmlane.engine_help import HELP
from mmlane.log import print_line
from mmlane.patching import Decision, Failure, Patcher, Refusal, Replacement, Target, apply
from mmlane.report import Report, skipped

# The engine's own way for plugins to replace things runs late: in schedulers, after everything is imported.
HOOKS_MODULE = "sglang.srt.plugins.hook_registry"
# When this module has been imported, so has every module of the engine that a main or tokenizer process uses.
LAST_MODULE = "sglang.srt.entrypoints.engine"
# The engine reads its `--config FILE` here; up to 0.5.18 in the former.
CONFIG_MODULES = ("sglang.srt.server_args_config_parser", "sglang.srt.utils.server_args_config_parser")
NOT_STARTED = f"{PREFIX}MMLANE_STRICT=1 and the engine would run without the above: not started"


class Session:
    """mmlane in this process: the settings it read, the plan it made, and what has become of it so far."""

    def __init__(self, chosen: settings.Settings, here: engine.Engine, trigger: str) -> None:
        specs, problems = compat.contributed(mmlane_patches)
        ids = [spec.id for spec in specs]
        unknown = sorted(chosen.disable.difference(ids))
        # It may well be a patch of a package that could not be loaded; or, in a child, of our parent's version.
        if unknown and not problems and not engine.is_child():
            given = chosen.as_typed("MMLANE_DISABLE", ",".join(unknown))
            raise settings.SettingsError(f"{given}: no such patch; there are: {', '.join(ids)}")
        self.settings = chosen
        self.engine = here
        self.trigger = trigger
        self.problems = problems
        self.patcher = Patcher(compat.plan(specs, here, chosen))
        self.extras: list[Replacement] = []
        self.has_reported = False
        self.printed: set[str] = set()

    def report(self) -> Report:
        return Report(
            engine=str(self.engine.version),
            untested=untested(self.engine),
            settings=self.settings,
            decisions=tuple(self.patcher.decisions.values()),
            problems=(*self.problems, *self.patcher.overridden()),
        )

    def watched(self) -> set[str]:
        """The engine modules whose import means something here."""
        return self.patcher.modules() | {HELP.module, HOOKS_MODULE, LAST_MODULE}

    def begin(self) -> None:
        """Patch what is imported, wait for the rest, and arrange for the report."""
        self.stop_if_strict()
        for name in sorted(self.watched(), key=LAST_MODULE.__eq__):
            loaded = sys.modules.get(name)
            if loaded is not None:
                self.module_ready(loaded)
            else:
                import_hook.WATCH.after[name] = guarded(self.module_ready)
        if import_hook.WATCH not in sys.meta_path:
            sys.meta_path.insert(0, import_hook.WATCH)
        if import_hook.is_unstarted_child():
            engine.when_child_runs(guarded(self.print_report))

    def module_ready(self, module: ModuleType) -> None:
        """Called with each watched module of the engine, as soon as its body has run."""
        skipped = self.patcher.standing("skipped")
        if "torch" in sys.modules:  # which it is for the engine to import first, and what is loaded needs
            self.patcher.load()
        self.patcher.module_ready(module)
        dropped = [d for d in self.patcher.standing("skipped") if d not in skipped]
        if dropped:
            self.drop(dropped)
        for extra in (HELP, self.after_hooks()):
            if module.__name__ == extra.module:
                self.add(extra, module)
        if module.__name__ == LAST_MODULE and not import_hook.is_unstarted_child():
            self.print_report()

    def drop(self, dropped: list[Decision]) -> None:
        """Say what cannot be applied after all, and have the processes that this one starts leave it out as well.

        A patch whose own code fails in a child may be in place in its peers: that ends the child.
        """
        self.stop_if_strict()
        failures = [d.reason for d in dropped if d.failed]
        if failures and engine.is_child():
            raise Failure(failures[0])
        for culprit in [d for d in dropped if not d.needs]:
            print_line(str(skipped([d for d in dropped if culprit.spec.id in (d.spec.id, d.needs)])))
        left_out = settings.read(os.environ).disable.union(d.spec.id for d in dropped)
        os.environ["MMLANE_DISABLE"] = ",".join(sorted(left_out))

    def add(self, extra: Target, module: ModuleType) -> None:
        """Replace something of the engine that no patch needs; where it is not there, only this is missing."""
        try:
            self.extras.append(apply(extra, module))
        except Refusal as refusal:
            if self.settings.log == "debug":
                print_line(str(refusal))

    def after_hooks(self) -> Target:
        """Look at our targets again when the engine has applied the hooks of all plugins."""

        def looking_again(apply_hooks: Callable[[Any], None]) -> Callable[[Any], None]:
            @functools.wraps(apply_hooks)
            def apply_hooks_and_look(cls: Any) -> None:
                apply_hooks(cls)
                guarded(self.look_again)()

            return apply_hooks_and_look

        return Target(HOOKS_MODULE, "HookRegistry.apply_hooks", "(cls)", looking_again)

    def look_again(self) -> None:
        """Log which targets another plugin has replaced since; with MMLANE_STRICT=1, that ends the process."""
        lines = list(map(str, self.patcher.overridden()))
        for line in lines:
            if line not in self.printed:
                self.printed.add(line)
                print_line(line)
        if lines and self.settings.strict:
            raise SystemExit(NOT_STARTED)

    def print_report(self) -> None:
        """Print this process's report, once: the block in the main process, a line in others when debugging."""
        if self.has_reported:
            return
        self.has_reported = True
        self.stop_if_strict()
        report = self.report()
        self.printed.update(map(str, report.problems))
        role = engine.role()
        if role == "main":
            lines = report.block() if self.settings.log != "warning" else report.attention()
            for line in lines:
                print_line(line)
        if self.settings.log == "debug":
            print_line(report.line(role, os.getpid(), self.trigger))

    def stop_if_strict(self) -> None:
        """With MMLANE_STRICT=1, end the process when a patch that the engine lacks cannot be applied."""
        if not self.settings.strict:
            return
        report = self.report()
        if report.unwanted() or report.problems:
            for problem in report.trouble():
                print_line(str(problem))
            raise SystemExit(NOT_STARTED)

    def undo(self) -> None:
        """Put every object of the engine back and stop watching."""
        self.patcher.undo()
        while self.extras:
            self.extras.pop().undo()
        for name in self.watched():
            import_hook.WATCH.after.pop(name, None)


session: Session | None = None
_started = False


def start(trigger: str) -> None:
    """Start mmlane in this process, once; a second call does nothing.

    Raises `SystemExit` for a setting that means nothing, and in strict mode for a patch that cannot be applied.
    Any other failure leaves the engine as it is, with one line that says so, in this process and in its children.
    A child that fails where its parent did not is ended: its peers would wait for it in their collectives.
    """
    global session, _started
    if _started:
        return
    _started = True
    try:
        # A child's command line is its parent's; what that had from a config file, the variables say.
        in_config = [] if engine.is_child() else flags.flags_in_config(sys.argv)
        if in_config:
            hide_from_engine()
        chosen = settings.read(os.environ, flags.take_flags(sys.argv, os.environ, in_config))
        if chosen.mode == "off":
            return
        here = engine.installed()
        if here is None:
            return
        session = Session(chosen, here, trigger)
        session.begin()
    except settings.SettingsError as error:
        raise SystemExit(f"{PREFIX}{error}") from None
    except Exception as error:  # noqa: BLE001 - whatever it is
        give_up(error)


def config_target(module: str) -> Target:
    """What reads the engine's config file, if it does so in that module."""
    return Target(module, "ConfigArgumentMerger._parse_yaml_config", "(self, file_path)", _without_our_keys)


def _without_our_keys(parse: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    @functools.wraps(parse)
    def parse_without_our_keys(self: Any, file_path: str) -> Any:
        found = parse(self, file_path)
        return {key: value for key, value in found.items() if not flags.is_mmlane_key(key)}

    return parse_without_our_keys


def hide_from_engine() -> None:
    """Have the engine pass over our keys in its config file, which it would refuse: also where mmlane is off."""
    for name in CONFIG_MODULES:
        loaded = sys.modules.get(name)
        if loaded is not None:
            hide_in(loaded)
        else:
            import_hook.WATCH.after[name] = hide_in
    if import_hook.WATCH not in sys.meta_path:
        sys.meta_path.insert(0, import_hook.WATCH)


def hide_in(module: ModuleType) -> None:
    """As `hide_from_engine`, in the module that reads the file."""
    try:
        apply(config_target(module.__name__), module)
    except Refusal as refusal:
        print_line(
            f"{refusal}; so the engine may refuse mmlane's keys in its config file; give them as flags instead"
        )


def guarded(step: Callable[..., None]) -> Callable[..., None]:
    """A step of ours for the engine to run: an unexpected failure does not reach the engine's own code."""

    @functools.wraps(step)
    def run(*args: Any) -> None:
        try:
            step(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is
            give_up(error)

    return run


def give_up(error: Exception) -> None:
    """Leave the engine as it was, or end this process: see `import_hook.give_up`."""
    global session
    if session is not None:
        session.undo()
        session = None
    if os.environ.get("MMLANE_LOG") == "debug":
        traceback.print_exception(error)
    import_hook.give_up(error, child=engine.is_child())


def stop() -> None:
    """Undo everything in this process, but for the keys hidden in a config file; `start` can be called again."""
    global session, _started
    if session is not None:
        session.undo()
    session = None
    _started = False


def register() -> None:
    """The engine calls this through its entry-point group `sglang.srt.plugins`."""
    start("entry point")


def untested(here: engine.Engine) -> str:
    """Why an engine counts as untested, in a few words; "" when its version is in the table."""
    known, version = compat.matrix(), here.version
    if known.knows(version):
        return ""
    if not here.version_known:
        return f"untested: of unknown version, taken for {known.newest}, checked by signature"
    if version > known.newest:
        return f"untested: newer than {known.newest}, checked by signature"
    if version < known.oldest:
        return f"unsupported: older than {known.oldest}"
    return "untested: not a published release, checked by signature"

"""The gate in front of the broadcast stands where the engine asks its input blocker, on every release."""

from __future__ import annotations

import ast

from mmlane.engine.source import EngineSource

MANAGERS = "sglang.srt.managers"
RECEIVERS = (
    (f"{MANAGERS}.scheduler_components.request_receiver", "SchedulerRequestReceiver.recv_requests"),
    (f"{MANAGERS}.scheduler", "Scheduler.recv_requests"),
)


def test_what_was_received_passes_there_before_it_is_broadcast(source: EngineSource) -> None:
    receive = next(found for place in RECEIVERS if (found := source.find(*place)) is not None)
    text = ast.unparse(receive)
    asked = text.index("recv_reqs = self.input_blocker.handle(recv_reqs)")
    assert "if self.input_blocker is not None:" in text[:asked]
    broadcast = min(
        at for name in ("broadcast_pyobj", "_broadcast_reqs_across_ranks") if (at := text.find(name)) > 0
    )
    assert asked < broadcast and "recv_pyobj" not in text[asked:]


def test_no_other_module_uses_the_input_blocker(source: EngineSource) -> None:
    scheduler = source.file(f"{MANAGERS}.scheduler")
    assert scheduler is not None
    users = {path.name for path in scheduler.parent.rglob("*.py") if ".input_blocker" in path.read_text()}
    assert "scheduler.py" in users and users <= {"scheduler.py", "request_receiver.py"}

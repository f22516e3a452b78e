"""The controller of replicas sends requests by its `workers`, as our side counts on, on every release."""

from __future__ import annotations

import ast

from mmlane.engine.source import EngineSource

MODULE = "sglang.srt.managers.data_parallel_controller"
CONTROLLER = "DataParallelController"
POLICIES = (
    "round_robin_scheduler",
    "total_requests_scheduler",
    "total_tokens_scheduler",
    "follow_bootstrap_room_scheduler",
    "maybe_external_dp_rank_routing",
)


def test_a_request_is_sent_to_one_of_the_workers(source: EngineSource) -> None:
    by_function = source.find("sglang.srt.managers.io_struct", "sock_send") is not None
    for policy in POLICIES:
        body = source.find(MODULE, f"{CONTROLLER}.{policy}")
        assert body is not None, policy
        text = ast.unparse(body)
        sends = "sock_send(self.workers[" if by_function else "].send_pyobj(req)"
        assert sends in text and "self.workers[" in text, policy
        assert by_function == ("send_pyobj" not in text), policy


def test_the_sockets_are_there_when_it_has_been_made(source: EngineSource) -> None:
    launch = source.find(MODULE, f"{CONTROLLER}.launch_dp_attention_schedulers")
    init = source.find(MODULE, f"{CONTROLLER}.__init__")
    assert launch is not None and init is not None
    assert "self.workers[" in ast.unparse(launch)
    assert "self.launch_dp_attention_schedulers(server_args, port_args)" in ast.unparse(init)


def test_a_request_is_sent_once(source: EngineSource) -> None:
    """Our side takes the tensors away once a message has been sent."""
    for name in ("dispatching_with_trace", "dispatch_batch_generate", "dispatch_batch_embedding"):
        if (body := source.find(MODULE, f"{CONTROLLER}.{name}")) is not None:
            text = ast.unparse(body)
            assert text.count("self.dispatching") <= 2 and "send_pyobj" not in text and "sock_send" not in text

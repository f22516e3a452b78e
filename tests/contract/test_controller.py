"""The controller of replicas sends requests by its `workers`, as our side counts on, on every release."""

from __future__ import annotations

import ast

from mmlane.engine.source import EngineSource

MODULE = "sglang.srt.managers.data_parallel_controller"
CONTROLLER = "DataParallelController"
POLICIES = ("round_robin_scheduler", "total_requests_scheduler", "maybe_external_dp_rank_routing")


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

"""Fingerprints of the engine's functions that patches replace or rely on: which bodies a person has read.

A wrapper at a stable seam still leans on what the wrapped body does. When a release changes such a body,
somebody has to read it again. The record names the releases at which each body changed, oldest first; `null`
is where it is no longer there.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from packaging.version import Version

from mmlane.engine.source import EngineSource
from mmlane.patching import PatchSpec

RECORD = Path(__file__).parent.parent / "tests" / "contract" / "fingerprints.json"

_MM = "sglang.srt.managers.mm_utils"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
_REQUEST = "sglang.srt.managers.io_struct.GenerateReqInput"
_MSGPACK = "sglang.srt.utils.msgpack_utils"
_IPC = "sglang.srt.utils.cuda_ipc_transport_utils"
_PROXY = f"{_IPC}.CudaIpcTensorTransportProxy"

_RECEIVE = (
    f"{_SCHEDULER}.recv_requests",
    f"{_RECEIVER}.recv_requests",
    f"{_RECEIVER}._broadcast_reqs_across_ranks",
    f"{_RECEIVER}.unwrap_pickle_wrapper",
    f"{_RECEIVER}._finalize_shm_features",
    f"{_MM}.unwrap_shm_features",
    f"{_MM}.has_shm_features",
)

# What each patch relies on, besides its targets, on any release.
RELIED_ON: Mapping[str, tuple[str, ...]] = {
    "shm_pointer": (
        f"{_MM}.ShmPointerMMData",
        f"{_MM}.wrap_shm_features",
        f"{_MM}._wrap_tensor_or_list",
        f"{_MM}._wrap_shm_or_inline",
        f"{_MM}._unwrap_tensor_or_list",
        f"{_MM}.discard_shm_features",
        f"{_MM}._feature_has_shm",
        f"{_MM}._get_is_default_transport",
        "sglang.srt.managers.io_struct.AbortReq",
        f"{_MSGPACK}._is_shm_pointer_mm_data",
        f"{_MSGPACK}._encode_shm_pointer_mm_data",
        f"{_MSGPACK}._decode_shm_pointer_mm_data",
        *_RECEIVE,
    ),
    "deferred_unwrap": _RECEIVE,
    "tp_barrier": _RECEIVE,
    "fan_out": (
        f"{_TOKENIZER}._handle_batch_request",
        f"{_MM}.wrap_shm_features",
    ),
    "fan_out_images": (
        f"{_REQUEST}.normalize_batch_and_arguments",
        f"{_REQUEST}._determine_batch_size",
        f"{_REQUEST}._handle_parallel_sampling",
        f"{_REQUEST}._normalize_image_data",
        f"{_REQUEST}._normalize_mm_hashes",
        f"{_REQUEST}._normalize_video_data",
        f"{_REQUEST}._normalize_audio_data",
    ),
    "one_node": ("sglang.srt.multimodal.transport.determine_tensor_transport_mode",),
    "inline_views": (
        f"{_MM}.get_new_expanded_mm_items",
        f"{_MM}._slice_value",
        f"{_MM}._slice_model_data",
        f"{_MM}._wrap_tensor_or_list",
        f"{_MM}._wrap_shm_or_inline",
    ),
    "lane": (
        f"{_MM}.wrap_shm_features",
        f"{_MM}._wrap_tensor_or_list",
        f"{_MM}._wrap_shm_or_inline",
        f"{_MM}._get_is_default_transport",
        "sglang.srt.managers.io_struct.MMInputsProcessError",
        "sglang.srt.managers.embed_types.PositionalEmbeds",
        "sglang.srt.managers.schedule_batch.MultimodalDataItem",
        "sglang.srt.managers.schedule_batch.MultimodalInputs.release_features",
        f"{_MSGPACK}._is_shm_pointer_mm_data",
        f"{_MSGPACK}._encode_shm_pointer_mm_data",
        f"{_MSGPACK}._decode_shm_pointer_mm_data",
        f"{_TOKENIZER}._handle_batch_request",
        f"{_CONTROLLER}.launch_dp_attention_schedulers",
        f"{_CONTROLLER}.dispatching_with_trace",
        f"{_CONTROLLER}.dispatch_batch_generate",
        f"{_CONTROLLER}.dispatch_batch_embedding",
        f"{_CONTROLLER}.dispatch_health_check",
        f"{_CONTROLLER}.send_control_message",
        f"{_CONTROLLER}.send_to_all_workers",
        f"{_CONTROLLER}.init_dispatcher",
        f"{_CONTROLLER}.round_robin_scheduler",
        f"{_CONTROLLER}.total_requests_scheduler",
        f"{_CONTROLLER}.total_tokens_scheduler",
        f"{_CONTROLLER}.follow_bootstrap_room_scheduler",
        f"{_CONTROLLER}.maybe_external_dp_rank_routing",
        "sglang.srt.managers.scheduler_input_blocker.SchedulerInputBlocker.handle",
        "sglang.srt.managers.scheduler.Scheduler.init_watch_dog_memory_saver_input_blocker",
        "sglang.srt.managers.scheduler.IdleSleeper",
        "sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper",
        "sglang.srt.managers.scheduler.SenderWrapper.send_output",
        "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper.send_output",
        *_RECEIVE,
    ),
    "ipc_redirect": (
        f"{_PROXY}.__init__",
        f"{_PROXY}.get_proxy_state",
        f"{_PROXY}._reconstruct_from_ipc_extra",
        f"{_IPC}._normalize_pool_cache_key",
        f"{_IPC}._pool_handle_cache_get_or_open",
    ),
    "ipc_pool_budget": (
        f"{_IPC}.MM_FEATURE_CACHE_SIZE",
        f"{_IPC}.MmItemMemoryPool.return_a_slice_tensor_with_flag",
        "sglang.srt.environ.Envs.SGLANG_MM_FEATURE_CACHE_MB",
        "sglang.srt.server_args.get_global_server_args",
    ),
    # Everyone who opens the lock file.
    "ipc_lock": (
        f"{_PROXY}.reconstruct_on_target_device",
        f"{_PROXY}._copy_slice_tensor_to_target",
        f"{_PROXY}._acknowledge_consumption",
    ),
    # The names of segments.
    "shm_sweep": ("sglang.srt.utils.stale_shm_cleanup.make_shm_name", f"{_MM}.ShmPointerMMData"),
}

Bodies = Mapping[str, str | None]
Record = Mapping[str, Mapping[str, str | None]]


def paths(spec: PatchSpec, version: Version) -> set[str]:
    """The bodies that matter to a patch on one release."""
    return {*(target.path for target in spec.targets_on(version)), *RELIED_ON.get(spec.id, ())}


def all_paths(specs: Iterable[PatchSpec]) -> list[str]:
    """The bodies that matter on any release."""
    replaced = {target.path for spec in specs for target in spec.targets}
    return sorted(replaced.union(*RELIED_ON.values()))


def bodies(source: EngineSource, wanted: Iterable[str]) -> Bodies:
    """The fingerprint of each body, None where it is not there."""
    return {path: None if (node := locate(source, path)) is None else fingerprint(node) for path in wanted}


def locate(source: EngineSource, path: str) -> ast.AST | None:
    """The definition at a dotted path whose front names a module."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        if source.file(module) is not None:
            return source.find(module, ".".join(parts[split:]))
    return None


def fingerprint(node: ast.AST) -> str:
    """A hash of a definition: not of its comments, docstrings, annotations or layout. The same on every Python."""
    return hashlib.sha256("\n".join(_words(node)).encode()).hexdigest()[:12]


_UNREAD = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind"}


def _words(node: object) -> Iterator[str]:
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                value = _without_docstring(value)
            if name not in _UNREAD and value not in (None, []):
                yield f"{name}="
                yield from _words(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _words(item)
        yield "]"
    else:
        yield repr(node)


def _without_docstring(body: Sequence[ast.stmt]) -> Sequence[ast.stmt]:
    match body[0]:
        case ast.Expr(value=ast.Constant(value=str())):
            return body[1:]
    return body


# --- the record --------------------------------------------------------------------------------------------


def load(file: Path = RECORD) -> Record:
    record: Record = json.loads(file.read_text(encoding="utf-8"))
    return record


def recorded(record: Record, version: Version) -> Bodies:
    """The bodies of a release according to the record: those of the last release at which each changed."""
    found: dict[str, str | None] = {}
    for path, changes in record.items():
        earlier = [Version(since) for since in changes if Version(since) <= version]
        found[path] = changes[str(max(earlier))] if earlier else None
    return found


def summarize(by_version: Mapping[Version, Bodies]) -> Record:
    """The record of what was found on each release."""
    record: dict[str, dict[str, str | None]] = {}
    for version in sorted(by_version):
        for path, body in by_version[version].items():
            changes = record.setdefault(path, {})
            before = list(changes.values())[-1] if changes else None
            if body != before:
                changes[str(version)] = body
    return record


def differences(before: Bodies, now: Bodies) -> dict[str, str]:
    """Each path whose body is not what it was: changed, gone, or new."""
    told = {}
    for path in sorted({*before, *now}):
        old, new = before.get(path), now.get(path)
        if old != new:
            told[path] = "new" if old is None else "gone" if new is None else "changed"
    return told

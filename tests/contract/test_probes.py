"""The probes can tell a fault from its fix, and say so when they can tell neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from mmlane.engine.source import EngineSource
from tools import probes
from tools.probes import (
    CUDA_IPC,
    ENGINE,
    ENVIRON,
    LEASED_POOL,
    LEASES,
    MM_UTILS,
    PROCESSORS,
    RECEIVERS,
    REQUESTS,
    TOKENIZER,
    TRANSPORT,
)
from tools.releases import release

RECEIVER, SCHEDULER = (module for module, _ in RECEIVERS)
WRAPPED = "self.text = [self.text]; self.image_data = [self.image_data]"

# Patch, module, what is put in place of what, and the fault that appears or, after "-", goes; None: unknown.
# By the release whose code is quoted: it may be any that has it.
Change = tuple[str, str, tuple[str, str], str | None]
CHANGES: dict[str, list[Change]] = {
    "0.5.9": [
        ("deferred_unwrap", SCHEDULER, ("unwrap_shm_features(recv_req)", "recv_req"), None),
        (
            "ipc_redirect",
            CUDA_IPC,
            ('                ipc_extra["handle"],', "                nearer(ipc_extra),"),
            None,
        ),
        ("ipc_redirect", CUDA_IPC, ("{source_device_index}", "{rebuild_device_idx}"), "-guards_producer"),
        ("ipc_redirect", CUDA_IPC, ("{source_device_index}", "{some_device}"), None),
        ("ipc_pool_budget", PROCESSORS, ("                MM_FEATURE_CACHE_SIZE,", "  A_SIZE,"), None),
        ("ipc_pool_budget", ENVIRON, ("EnvInt(4 * 1024)", "EnvInt(2 * 1024)"), None),
        ("ipc_pool_budget", ENVIRON, ("EnvInt(4 * 1024)", "EnvInt(1 * 1024)"), "-four_gib"),
        (
            "ipc_pool_budget",
            CUDA_IPC,
            ("        return None, None\n", "        logger.warning(0)\n"),
            "-silent_when_full",
        ),
        ("ipc_pool_budget", CUDA_IPC, ("self.get_available_chunk(", "self.find_room("), None),
        ("ipc_lock", CUDA_IPC, ('open(SHM_LOCK_FILE, "w+")', 'open(A_FILE, "r")'), None),
        ("ipc_lock", CUDA_IPC, ('"/tmp/shm_wr_lock.lock"', '"/run/lock"'), None),
    ],
    "0.5.10": [
        ("shm_pointer", MM_UTILS, ("self._shm_handle = shared", "self.unlink(); shared"), "unlinks_in_setstate"),
        ("deferred_unwrap", SCHEDULER, ("unwrap_shm_features(", "mend("), None),
        ("deferred_unwrap", SCHEDULER, ("self.recv_limit_reached(", "unwrap_shm_features("), None),
        ("fan_out", TOKENIZER, ("tokenized_obj.stream = False", "own_items(tokenized_obj)"), None),
        ("ipc_redirect", CUDA_IPC, ("cuda(\n                        *ipc_extra", "cuda(\n  *mended"), None),
    ],
    "0.5.11": [
        ("ipc_redirect", CUDA_IPC, ("(rebuild_device_idx,) + tuple", "tuple"), None),
        (
            "ipc_redirect",
            CUDA_IPC,
            ("open(cache_key, redirected_handle)", 'open(0, ipc_extra["pool_handle"])'),
            "opens_on_producer",
        ),
        ("ipc_redirect", CUDA_IPC, ("{rebuild_device_idx}", "{ipc_extra['device_index']}"), "guards_producer"),
        ("ipc_redirect", CUDA_IPC, ("class CudaIpcTensorTransportProxy", "class Proxy"), None),
        (
            "ipc_pool_budget",
            PROCESSORS,
            ("                per_worker_pool_size,", "  MM_FEATURE_CACHE_SIZE,"),
            "whole_pool_each",
        ),
        ("ipc_pool_budget", PROCESSORS, ("MM_FEATURE_CACHE_SIZE // worker_num", "MM_FEATURE_CACHE_SIZE"), None),
        ("ipc_pool_budget", CUDA_IPC, ("self._warn_pool_full_once(src_tensor)", "pass"), "silent_when_full"),
        ("ipc_pool_budget", CUDA_IPC, ("class MmItemMemoryPool", "class Pool"), None),
    ],
    "0.5.14": [
        ("shm_pointer", MM_UTILS, ("= shm.name", "= shm.reserve_in_a_new_way()"), None),
        ("shm_pointer", MM_UTILS, ("item.precomputed_embeddings", "item.embeddings"), "embeddings_inline"),
        ("tp_barrier", RECEIVER, ("barrier(group", "rendezvous(group"), None),
        ("tp_barrier", RECEIVER, ("barrier(group", "print(of"), "no_barrier"),
        ("fan_out", TOKENIZER, ("tokenized_obj.mm_inputs.mm_items =", "items ="), "shares_items"),
    ],
    "0.5.17": [
        ("ipc_lock", CUDA_IPC, ("SHM_LOCK_FILE = ", "THE_LOCK_FILE = "), None),
    ],
    "0.5.18": [
        ("ipc_lock", LEASED_POOL, ("import threading", "from fcntl import flock"), None),
        ("one_node", TOKENIZER, ("server_args.dist_init_addr", "server_args.nnodes > 1"), None),
        ("ipc_pool_budget", LEASES, ("self._warn_pool_full_once(nbytes)", "pass"), "silent_when_full"),
    ],
    "0.5.20": [
        ("shm_pointer", MM_UTILS, ("self.tensor.clone()", "self.tensor.mend()"), None),
    ],
    "0.5.23": [
        ("shm_pointer", MM_UTILS, ("os.posix_fallocate", "frombuffer"), "sigbus_on_full_shm"),
        ("shm_pointer", MM_UTILS, ("os.posix_fallocate", "reserve_in_a_new_way"), None),
        ("shm_pointer", MM_UTILS, ("ACCESS_COPY", "ACCESS_WRITE"), "clones_on_receipt"),
        ("shm_pointer", MM_UTILS, ("except OSError as e", "except KeyError as e"), "full_shm_fails_request"),
        ("shm_pointer", MM_UTILS, ("except Exception as e", "except KeyError as e"), "raises_in_setstate"),
        ("shm_pointer", RECEIVER, ("except Exception:", "except KeyError:"), "lost_segment_ends_server"),
        ("shm_pointer", RECEIVER, ("all_reduce(", "vote("), None),
        ("shm_pointer", MM_UTILS, ("class ShmPointerMMData", "class Pointer"), None),
        ("tp_barrier", RECEIVER, ("barrier(group=parallel.attn", "print(of=parallel.attn"), "barrier_on_tp_only"),
        ("tp_barrier", RECEIVER, ("barrier(group=parallel.attn_cp", "print(of=parallel.attn_cp"), None),
        ("fan_out", TOKENIZER, ("_send_one_request(", "_send("), None),
        ("fan_out_images", REQUESTS, ("self.text = [self.text]", WRAPPED), "-images_as_batch"),
        ("fan_out_images", REQUESTS, ("len(self.image_data) != self.batch_size", "self.bad()"), None),
        ("fan_out_images", REQUESTS, ("self.video_data * self.par", "self.own_videos * self.par"), None),
        ("fan_out_images", REQUESTS, ("class GenerateReqInput", "class Request"), None),
        ("one_node", TRANSPORT, ("nnodes > 1", "has_many_nodes"), None),
        (
            "inline_views",
            MM_UTILS,
            ("return ShmPointerMMData(", "return tensor.clone() or ShmPointerMMData("),
            "-whole_storage",
        ),
        ("inline_views", MM_UTILS, ("return value[start:end]", "return cut(value)"), None),
        ("inline_views", PROCESSORS, ("get_new_expanded_mm_items(", "split("), None),
        ("shm_sweep", ENGINE, ("        load_plugins()\n", "        cleanup_stale_shm()\n"), None),
        ("shm_sweep", ENGINE, (" _set_envs_and_config(server_args)\n", " pass\n"), None),
    ],
}
CASES = [(number, *change) for number, changes in CHANGES.items() for change in changes]


class Changed(EngineSource):
    """An engine of which one module is another file."""

    def __init__(self, real: EngineSource, module: str, file: Path) -> None:
        super().__init__(real.root)
        self.changed = {module: file}

    def file(self, module: str) -> Path | None:
        return self.changed.get(module) or super().file(module)


@pytest.mark.parametrize(("number", "patch", "module", "change", "outcome"), CASES)
def test_a_changed_engine_is_seen(
    number: str, patch: str, module: str, change: tuple[str, str], outcome: str | None, tmp_path: Path
) -> None:
    real = release(Version(number)).source
    assert real is not None
    file = real.file(module)
    assert file is not None
    text = file.read_text(encoding="utf-8")
    assert change[0] in text
    changed = Changed(real, module, tmp_path / file.name)
    (tmp_path / file.name).write_text(text.replace(*change), encoding="utf-8")
    if outcome is None:
        with pytest.raises(probes.Unknown, match=r"\w"):
            probes.faults(changed, patch)
    else:
        fault = outcome.removeprefix("-")
        assert (fault in probes.faults(real, patch)) is outcome.startswith("-")
        assert (fault in probes.faults(changed, patch)) is not outcome.startswith("-")

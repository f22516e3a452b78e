"""The probes can tell a fault from its fix, and say so when they can tell neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from mmlane.patching import EngineSource
from tools import probes
from tools.probes import ENGINE, MM_UTILS, RECEIVERS, REQUESTS, TOKENIZER
from tools.releases import release

RECEIVER, SCHEDULER = (module for module, _ in RECEIVERS)
WRAPPED = "self.text = [self.text]; self.image_data = [self.image_data]"

# Patch, module, what is put in place of what, and the fault that appears or, after "-", goes; None: unknown.
Change = tuple[str, str, tuple[str, str], str | None]
CHANGES: dict[str, list[Change]] = {
    "0.5.9": [
        ("deferred_unwrap", SCHEDULER, ("unwrap_shm_features(recv_req)", "recv_req"), None),
    ],
    "0.5.10": [
        ("shm_pointer", MM_UTILS, ("self._shm_handle = shared", "self.unlink(); shared"), "unlinks_in_setstate"),
        ("deferred_unwrap", SCHEDULER, ("unwrap_shm_features(", "mend("), None),
        ("deferred_unwrap", SCHEDULER, ("self.recv_limit_reached(", "unwrap_shm_features("), None),
        ("fan_out", TOKENIZER, ("tokenized_obj.stream = False", "own_items(tokenized_obj)"), None),
    ],
    "0.5.14": [
        ("shm_pointer", MM_UTILS, ("= shm.name", "= shm.reserve_in_a_new_way()"), None),
        ("shm_pointer", MM_UTILS, ("item.precomputed_embeddings", "item.embeddings"), "embeddings_inline"),
        ("tp_barrier", RECEIVER, ("barrier(group", "rendezvous(group"), None),
        ("tp_barrier", RECEIVER, ("barrier(group", "print(of"), "no_barrier"),
        ("fan_out", TOKENIZER, ("tokenized_obj.mm_inputs.mm_items =", "items ="), "shares_items"),
    ],
    "0.5.20": [
        ("shm_pointer", MM_UTILS, ("self.tensor.clone()", "self.tensor.mend()"), None),
    ],
    "0.5.23": [
        ("shm_pointer", MM_UTILS, ("os.posix_fallocate", "frombuffer"), "no_reserve"),
        ("shm_pointer", MM_UTILS, ("os.posix_fallocate", "reserve_in_a_new_way"), None),
        ("shm_pointer", MM_UTILS, ("ACCESS_COPY", "ACCESS_WRITE"), "clones_on_receipt"),
        ("shm_pointer", MM_UTILS, ("except OSError as e", "except KeyError as e"), "no_inline"),
        ("shm_pointer", MM_UTILS, ("except Exception as e", "except KeyError as e"), "open_raises_in_setstate"),
        ("shm_pointer", RECEIVER, ("except Exception:", "except KeyError:"), "no_isolation"),
        ("shm_pointer", RECEIVER, ("all_reduce(", "vote("), None),
        ("shm_pointer", MM_UTILS, ("class ShmPointerMMData", "class Pointer"), None),
        ("tp_barrier", RECEIVER, ("barrier(group=parallel.attn", "print(of=parallel.attn"), "barrier_on_tp_only"),
        ("tp_barrier", RECEIVER, ("barrier(group=parallel.attn_cp", "print(of=parallel.attn_cp"), None),
        ("fan_out", TOKENIZER, ("_send_one_request(", "_send("), None),
        ("fan_out_images", REQUESTS, ("self.text = [self.text]", WRAPPED), "-images_as_batch"),
        ("fan_out_images", REQUESTS, ("len(self.image_data) != self.batch_size", "self.bad()"), None),
        ("fan_out_images", REQUESTS, ("self.video_data * self.par", "self.own_videos * self.par"), None),
        ("fan_out_images", REQUESTS, ("class GenerateReqInput", "class Request"), None),
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

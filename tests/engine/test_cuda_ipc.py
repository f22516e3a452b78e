"""Features as CUDA IPC handles: what the engine's own modules do with them, without the plugin and with it.

There is no GPU here: a stand-in records what would be done on which one; see ipc_consumer.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from devkit.cache import cache_root
from devkit.sharedmemory import can_be_private
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.cuda_ipc import LEASED, NATIVE, POOLED, Results, cuda_ipc, run

HIDDEN = cache_root().resolve().is_relative_to("/tmp")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        HIDDEN or not can_be_private(), reason="needs a /tmp of its own, and the right to make one"
    ),
]

THREE = ("0.5.9", "0.5.10.post1", "0.5.12.post1")


@pytest.fixture(scope="session")
def chosen(version: str, request: pytest.FixtureRequest) -> Version:
    """Three releases, or those that were asked for."""
    if request.config.getoption("--engines") == "usual" and version not in THREE:
        pytest.skip("with --engines all, or naming this release")
    return Version(version)


@pytest.fixture(scope="session")
def unpatched(chosen: Version, transcripts: Transcripts) -> dict[str, Results]:
    found: dict[str, Results] = transcripts.of(str(chosen), cuda_ipc)
    return found


@pytest.fixture(scope="session")
def patched(chosen: Version, plugin_wheel: Path) -> dict[str, Results]:
    if chosen >= LEASED:
        pytest.skip("none of these patches from 0.5.18 on")
    pools = ("unset", "64", "4096") if chosen < NATIVE else ()
    return run(str(chosen), plugin_wheel, "take", "squatted", *pools)


@pytest.fixture(scope="session")
def mended(chosen: Version, request: pytest.FixtureRequest) -> dict[str, Results]:
    """With the fix of #22662: ours, or the engine's own without the plugin."""
    found: dict[str, Results] = request.getfixturevalue("patched" if chosen < NATIVE else "unpatched")
    return found


# --- ipc_redirect --------------------------------------------------------------------------------------------


def test_unpatched_a_rank_works_on_the_producers_gpu(chosen: Version, unpatched: dict[str, Results]) -> None:
    if chosen >= NATIVE:
        pytest.skip("from 0.5.11 the engine itself stays on the rank's")
    take = unpatched["take"]
    assert take["unpooled"] == taken_under(0, pooled=False, current=0 if chosen < POOLED else None)
    if chosen >= POOLED:
        assert take["pooled"] == taken_under(0, pooled=True)
        # Three tensors: the second needs no opening.
        assert take["stale"]["opened"] == [[0, 0], [0, 0]]
        assert take["stale"]["keys"] == [0]


def test_a_rank_works_on_its_own_gpu_alone(chosen: Version, mended: dict[str, Results]) -> None:
    """The tensor is right, the handle is opened on the reader's device, and what the rank has got is as it was."""
    take = mended["take"]
    if chosen < LEASED:
        current = None if POOLED <= chosen < NATIVE else 1
        assert take["unpooled"] == taken_under(1, pooled=False, current=current)
    if chosen >= POOLED:
        assert take["pooled"] == taken_under(1, pooled=True, counted=None if chosen >= LEASED else 1.0)


def test_what_goes_bad_in_the_cache_is_opened_again(chosen: Version, mended: dict[str, Results]) -> None:
    if chosen < POOLED:
        pytest.skip("nothing is kept on 0.5.9")
    assert mended["take"]["stale"] == {
        "contexts": [1],
        "opened": [[1, 1], [1, 1]],
        "right": [True, True, True],
        "keys": [1],
        "mended": True,
    }


def test_nothing_to_redirect(chosen: Version, mended: dict[str, Results]) -> None:
    if chosen >= LEASED:
        pytest.skip("a rank cannot take a tensor without a GPU")
    take = mended["take"]
    assert take["same-device"]["contexts"] == [0]
    assert take["same-device"]["right"] is take["same-device"]["restored"] is True
    assert take["by-value"] == {"right": True}
    assert take["failing"] == {"error": "CUDA error: invalid resource handle", "restored": True}
    assert take["unseen"]["contexts"] == [0]
    assert take["unseen"]["right"] is True
    assert take["unseen"]["asked"] == []


def test_a_gpu_that_cannot_reach_the_producers(chosen: Version, patched: dict[str, Results]) -> None:
    """There the engine's way is the only one; each pair of devices is asked for, and named, once."""
    if chosen >= NATIVE:
        pytest.skip("from 0.5.11 the engine does not ask")
    found = patched["take"]["unreachable"]
    assert found["right"] == [True] * 4
    assert [handle for _, handle in found["opened"]] == [0, 0, 0, 7]
    assert found["asked"] == [[5, 0], [6, 0], [7, 0]]
    assert len(found["said"]) == 2
    for device, line in zip((5, 6), found["said"], strict=True):
        assert line.startswith(
            f"WARNING: mmlane: wanted peer access from cuda:{device} to cuda:0, found none; so "
        )
        assert line.endswith("MMLANE_DISABLE=ipc_redirect")


def taken_under(device: int, *, pooled: bool, current: int | None = -1, counted: float | None = 1.0) -> Any:
    """A tensor of cuda:0 that cuda:1 took, after opening its handle as `device`."""
    return {
        "contexts": sorted({device, 1}),
        "opened": [[device if current == -1 else current, device]],
        "right": True,
        "keys": [device] if pooled else [],
        "restored": True,
        "counted": counted,
    }


# --- ipc_pool_budget -----------------------------------------------------------------------------------------


def sizes(found: dict[str, Results], part: str) -> list[float]:
    return [found[part]["pools"][workers] for workers in ("1", "2", "16")]


def test_unpatched_each_worker_takes_the_whole(chosen: Version, unpatched: dict[str, Results]) -> None:
    if chosen >= NATIVE:
        pytest.skip("from 0.5.11 the engine itself shares it out")
    assert sizes(unpatched, "unset") == [4096, 4096, 4096]
    assert sizes(unpatched, "64") == [64, 64, 64]
    assert unpatched["unset"]["overflow"] == {"refused": 6, "fits": True, "said": []}


def test_the_workers_share_what_was_set(chosen: Version, patched: dict[str, Results]) -> None:
    if chosen >= NATIVE:
        pytest.skip("from 0.5.11 the engine itself shares it out")
    assert sizes(patched, "unset") == [1024, 512, 128]  # 16 workers have no less than 128 MiB each
    assert sizes(patched, "64") == [64, 64, 64]  # and none more than there is
    assert sizes(patched, "4096") == [4096, 2048, 256]  # which is what the engine takes when nothing is set
    (said,) = patched["4096"]["pools"]["said"]
    assert said == (
        "INFO: mmlane: the pool of CUDA IPC features takes 256 MiB of GPU memory in each of 16 tokenizer workers "
        "(SGLANG_MM_FEATURE_CACHE_MB: 4096 MiB for all, each with 128 at least)"
    )


def test_the_engine_shares_it_out_itself(chosen: Version, unpatched: dict[str, Results]) -> None:
    if not NATIVE <= chosen < Version("0.5.14"):
        pytest.skip("from 0.5.14 on a pool is made in another way; up to 0.5.10 it is not shared out")
    assert sizes(unpatched, "unset") == [1024, 512, 128]


def test_a_pool_says_once_that_it_is_full(chosen: Version, mended: dict[str, Results]) -> None:
    if chosen >= Version("0.5.14"):
        pytest.skip("from 0.5.14 on a pool is made in another way")
    found = mended["64"]["overflow"]
    assert (found["refused"], found["fits"]) == (6, True)
    if chosen < NATIVE:
        line = (
            "WARNING: mmlane: a feature of 64.00 MiB found no room in the pool of CUDA IPC features, which has "
            "64.00 MiB; so it goes by the CPU, through the lane or shared memory, which is slower; if features "
            "often do, raise SGLANG_MM_FEATURE_CACHE_MB; said once"
        )
        assert found["said"] == [line] * 2  # once for each of two pools
    else:
        assert len(found["said"]) == 2


# --- ipc_lock ------------------------------------------------------------------------------------------------


def test_unpatched_a_link_in_tmp_empties_a_file(chosen: Version, unpatched: dict[str, Results]) -> None:
    if chosen >= LEASED:
        pytest.skip("from 0.5.18 there is no lock file")
    lock = unpatched["take"]
    assert lock["link"] == {"victim": "", "lock": "/tmp/shm_wr_lock.lock", "right": True, "counted": 1.0}
    assert lock["others-file"] == {"answer": "PermissionError: /tmp/shm_wr_lock.lock", "counted": 0.0}


def test_no_other_user_can_touch_the_lock(chosen: Version, patched: dict[str, Results]) -> None:
    """And it is a lock still: two ranks wait for it, and lose no count."""
    lock = patched["take"]
    file = f"/tmp/mmlane-{os.geteuid()}/shm_wr_lock.lock"
    assert lock["link"] == {"victim": "precious", "lock": file, "right": True, "counted": 1.0}
    assert lock["others-file"] == {"answer": "True", "counted": 1.0}
    assert lock["exclusion"] == {"counted before": 0.0, "counted": 600.0, "exits": [0, 0]}


def test_a_directory_that_is_taken_is_passed_over(chosen: Version, patched: dict[str, Results]) -> None:
    found = patched["squatted"]
    file = "/tmp/home/.cache/mmlane/lock/shm_wr_lock.lock"
    assert found["link"] == {"victim": "precious", "lock": file, "right": True, "counted": 1.0}
    assert found["mmlane"] == {"lines": []}

"""`fan_out_images` around the real normalization of every release: its `GenerateReqInput`, run alone.

The class is taken from the release's source with its methods as they are, so that no engine has to be installed.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from devkit.wheels import wheel_source
from mmlane.compat import matrix
from mmlane.patching import apply
from mmlane_patches.fan_out_images import SPEC

(TARGET,) = SPEC.targets


@dataclasses.dataclass(kw_only=True)
class Base:
    """What `GenerateReqInput` has from the engine's own base classes."""

    rid: Any = None
    http_worker_ipc: Any = None
    session_id: Any = None

    def _validate_rid_uniqueness(self) -> None:
        """On some releases the base class's; it has no part in this."""


@pytest.fixture(scope="module", params=[str(version) for version in matrix().engines if TARGET.serves(version)])
def io_struct(request: pytest.FixtureRequest) -> ModuleType:
    """A module of the engine's name with its `GenerateReqInput` alone."""
    file = wheel_source(request.param) / "sglang/srt/managers/io_struct.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "GenerateReqInput")
    found.bases, found.keywords, found.decorator_list = [ast.Name("Base", ast.Load())], [], []
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ModuleType(TARGET.module)
    module.__file__ = str(file)
    vars(module).update(
        Base=Base,
        uuid=uuid,
        copy=copy,
        field=dataclasses.field,
        _API_SERVING_TIMING_MIXIN_FIELDS=(),
        get_return_hidden_states_mode=lambda value: value,
    )
    code = compile(ast.fix_missing_locations(ast.Module([future, found], [])), str(file), "exec")
    exec(code, vars(module))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, TARGET.module, module)  # where a dataclass looks itself up
        dataclasses.dataclass(kw_only=True)(vars(module)["GenerateReqInput"])
    return module


def normalized(io_struct: ModuleType, **arguments: Any) -> Any:
    """A request as the tokenizer manager gets it after the engine's own normalization."""
    request = vars(io_struct)["GenerateReqInput"](**arguments)
    request.normalize_batch_and_arguments()
    return request


def seen(io_struct: ModuleType, field: str, value: Any, n: int = 3) -> Any:
    """What the one prompt of a request with n samples has in a field when it is tokenized."""
    request = normalized(io_struct, text="hi", sampling_params={"n": n}, **{field: value})
    assert request.batch_size == 1 and request.parallel_sample_num == n
    assert len(request.text) == len(getattr(request, field)) == n
    return getattr(request[0], field)


@pytest.fixture
def patched(io_struct: ModuleType) -> Any:
    replacement = apply(TARGET, io_struct)
    assert replacement.in_force()
    yield io_struct
    replacement.undo()


def test_without_the_patch_several_images_are_refused(io_struct: ModuleType) -> None:
    with pytest.raises(ValueError, match="length of image_data should be equal to the batch size"):
        seen(io_struct, "image_data", ["a", "b"])


@pytest.mark.parametrize("field", ["video_data", "audio_data"])
def test_without_the_patch_only_the_first_is_seen(io_struct: ModuleType, field: str) -> None:
    request = normalized(io_struct, text="hi", sampling_params={"n": 3}, **{field: ["a", "b"]})
    assert getattr(request[0], field) == "a"


@pytest.mark.parametrize("field", ["image_data", "video_data", "audio_data"])
@pytest.mark.parametrize("value", [["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]], ids=len)
def test_all_of_one_prompt_are_seen(patched: ModuleType, field: str, value: list[str]) -> None:
    assert seen(patched, field, value) == value


def test_what_the_engine_took_rightly_stays(patched: ModuleType) -> None:
    assert seen(patched, "image_data", "a") == ["a"]
    assert seen(patched, "image_data", [["a", "b"]]) == ["a", "b"]
    assert seen(patched, "image_data", []) is None
    assert seen(patched, "image_data", None) is None
    assert seen(patched, "video_data", "a") == "a"
    assert seen(patched, "video_data", [["a", "b"]]) == ["a", "b"]


def test_images_are_not_spread_over_other_prompts(patched: ModuleType) -> None:
    with pytest.raises(ValueError, match="length of image_data"):
        seen(patched, "image_data", [["a"], ["b"]])


def test_without_samples_nothing_changes(patched: ModuleType) -> None:
    request = normalized(
        patched, text="hi", sampling_params={"n": 1}, image_data=["a", "b"], video_data=["c", "d"]
    )
    assert (request.is_single, request.image_data, request.video_data) == (True, ["a", "b"], ["c", "d"])


def test_a_batch_of_prompts_is_left_alone(patched: ModuleType) -> None:
    request = normalized(
        patched, text=["hi", "ho"], sampling_params={"n": 2}, image_data=["a", "b"], video_data=["c", "d"]
    )
    assert [request[i].image_data for i in range(4)] == [["a"], ["b"], ["a"], ["b"]]
    assert [request[i].video_data for i in range(4)] == ["c", "d", "c", "d"]


def test_the_rest_of_the_request_is_fanned_out_as_before(patched: ModuleType) -> None:
    request = normalized(
        patched,
        input_ids=[1, 2],
        sampling_params={"n": 2, "temperature": 0},
        image_data=["a", "b"],
        rid="r",
        bootstrap_host="h",
        bootstrap_room=5,
    )
    assert [request[i].input_ids for i in range(2)] == [[1, 2], [1, 2]]
    assert request[0].rid.startswith("r") and request[0].bootstrap_host == "h"
    assert request[0].bootstrap_room == 5 and request[0].sampling_params["temperature"] == 0


@pytest.mark.parametrize("field", ["mm_hashes", "mm_content_hashes"])
def test_hashes_stay_with_their_images(patched: ModuleType, field: str) -> None:
    if not hasattr(vars(patched)["GenerateReqInput"], "_normalize_mm_hashes"):
        pytest.skip("this release does not hand hashes to the samples")
    request = normalized(
        patched, text="hi", sampling_params={"n": 2}, image_data=["a", "b"], **{field: ["1", "2"]}
    )
    assert getattr(request[0], field) == getattr(request[1], field) == ["1", "2"]


def test_undo_restores_the_engines_function(io_struct: ModuleType) -> None:
    owner = vars(io_struct)["GenerateReqInput"]
    original = vars(owner)["_handle_parallel_sampling"]
    replacement = apply(TARGET, io_struct)
    replacement.undo()
    assert vars(owner)["_handle_parallel_sampling"] is original


def test_the_patch_file_brings_in_neither_torch_nor_the_engine() -> None:
    import subprocess

    code = "import sys, mmlane_patches; sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)

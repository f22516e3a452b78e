"""fan_out_images: with n > 1 the images, videos and audios of one prompt stay together.

Why: for n > 1 the engine turns the one prompt into a batch of one, but not the list of its images. Two
images are then "not equal to the batch size" (HTTP 400); of two videos or audios only the first reaches the
model, silently.
Upstream: none yet.
How: `GenerateReqInput._handle_parallel_sampling` makes that batch; after it, a flat list becomes a list of one
list, which the engine's own normalization takes as it is. Lists that are nested already are left alone.
When it can go: when a release normalizes the inputs of one prompt before it fans out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mmlane.compat import matrix
from mmlane.engine.prompts import lists_of_a_prompt
from mmlane.log import guarded
from mmlane.patching import Target


def _keep_together(request: Any) -> None:
    for field, value in lists_of_a_prompt(request).items():
        setattr(request, field, [value])


def _handle_parallel_sampling(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(original)
    def handle_parallel_sampling(self: Any) -> None:
        was_single = self.is_single
        original(self)
        with guarded("fan_out_images", "a request for several images with n > 1 may be refused"):
            if was_single and not self.is_single:
                _keep_together(self)

    return handle_parallel_sampling


REQUEST = "sglang.srt.managers.io_struct.GenerateReqInput"

SPEC = matrix().spec(
    "fan_out_images",
    targets=(
        Target(
            module="sglang.srt.managers.io_struct",
            name="GenerateReqInput._handle_parallel_sampling",
            signature="(self)",
            replace=_handle_parallel_sampling,
        ),
    ),
    relies_on=(
        f"{REQUEST}.normalize_batch_and_arguments",
        f"{REQUEST}._determine_batch_size",
        f"{REQUEST}._handle_parallel_sampling",
        f"{REQUEST}._normalize_image_data",
        f"{REQUEST}._normalize_mm_hashes",
        f"{REQUEST}._normalize_video_data",
        f"{REQUEST}._normalize_audio_data",
    ),
)

"""What a request says of its prompt before that is tokenized, on every version."""

from __future__ import annotations

from typing import Any

# Of what one prompt may have several: its inputs, and from 0.5.13 and 0.5.18 on what is kept beside each image.
_LISTS = ("image_data", "video_data", "audio_data", "mm_hashes", "mm_content_hashes")


def lists_of_a_prompt(request: Any) -> dict[str, list[Any]]:
    """The fields of a request with one prompt that have a flat list, which is of that prompt alone."""
    values = {field: getattr(request, field, None) for field in _LISTS}
    return {
        field: value
        for field, value in values.items()
        if isinstance(value, list) and value and not isinstance(value[0], list)
    }


def sample_count(request: Any) -> int:
    """How many samples a request wants of each prompt (`n`); requests for embeddings have no such field."""
    return int(getattr(request, "parallel_sample_num", 1))

"""`sglang.Engine` in a script whose author keeps one tensor and puts the next picture into it. A test runs:

    PYTHON_OF_AN_ENGINE refilled.py OUTPUT SAMPLES[,SAMPLES] ARGUMENTS_OF_THE_ENGINE...

Pixels and embeddings, four pictures one after the other, each with each number of samples. OUTPUT gets a JSON
object: what was answered, and with the plugin what the lane has counted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

HIDDEN = 64  # of the devkit's checkpoints
PATCH = 3 * 2 * 14 * 14
# Kind -> how many patches the picture has, and the tensor's shape: more bytes than travel inside a request.
NAMES = {"pixels": "pixel_values", "embeddings": "precomputed_embeddings"}
KINDS = {"pixels": ((1, 16, 16), (256, PATCH)), "embeddings": ((1, 32, 64), (512, HIDDEN))}


def by_numpy(tensor: torch.Tensor, picture: torch.Tensor) -> None:
    tensor.numpy()[:] = picture.numpy()


def by_data(tensor: torch.Tensor, picture: torch.Tensor) -> None:
    tensor.data.copy_(picture)


def by_dlpack(tensor: torch.Tensor, picture: torch.Tensor) -> None:
    from_dlpack(tensor).copy_(picture)


PICTURES = (by_numpy, by_numpy, by_data, by_dlpack)


def ask(engine: Any, kind: str, tensor: torch.Tensor, samples: int) -> list[dict[str, Any]]:
    """The tokens of each sample, and how likely they were."""
    grid, _ = KINDS[kind]
    image = {
        "format": "processor_output",
        "modality": "IMAGE",
        "image_grid_thw": torch.tensor([grid]),
        NAMES[kind]: tensor,
    }
    pads = "<|image_pad|>" * (grid[1] * grid[2] // 4)
    answer = engine.generate(
        prompt=f"<|vision_start|>{pads}<|vision_end|>Describe it.",
        image_data=[image],
        sampling_params={"temperature": 0, "max_new_tokens": 8, "n": samples},
        return_logprob=True,
    )
    answers = answer if isinstance(answer, list) else [answer]
    return [
        {
            "tokens": one["output_ids"],
            "logprobs": [chance for chance, *_ in one["meta_info"]["output_token_logprobs"]],
        }
        for one in answers
    ]


def open_lane(engine: Any) -> Any:
    """The lane of this process, with the plugin; the first feature invites the ranks."""
    ask(engine, "pixels", torch.zeros(KINDS["pixels"][1]), 1)
    ours: Any = sys.modules.get("mmlane.transport.tokenizer_side")
    if ours is None:
        return None
    lane = getattr(engine.tokenizer_manager, ours.SIDE).producer.lane
    assert lane.wait_open(60)
    return lane


def main() -> None:
    import sglang
    from sglang.srt.server_args import prepare_server_args

    output, counts, *arguments = sys.argv[1:]
    engine = sglang.Engine(server_args=prepare_server_args(arguments))
    try:
        lane = open_lane(engine)
        random = np.random.default_rng(11)
        answers: dict[str, list[Any]] = {}
        for kind, (_, shape) in KINDS.items():
            tensor = torch.from_numpy(np.zeros(shape, np.float32))
            for number, refill in enumerate(PICTURES):
                refill(tensor, torch.from_numpy(random.standard_normal(shape, np.float32)))
                for count in counts.split(","):
                    name = f"{kind}, picture {number}, n={count}"
                    answers[name] = ask(engine, kind, tensor, int(count))
        found = {"answers": answers, "lane": lane and asdict(lane.stats())}
        Path(output).write_text(json.dumps(found))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()

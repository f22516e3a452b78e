"""Real JPEG images, the same bytes for the same size and seed, made once and cached."""

from __future__ import annotations

from pathlib import Path

from devkit.cache import build_once, cache_root, digest
from devkit.environment import base_environment
from devkit.installer import run, venv_python

# Gradients with blobs on them: compresses like a photograph, and each seed looks different.
_PAINTER = """
import sys
import numpy as np
from PIL import Image
width, height, seed, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
random = np.random.default_rng(seed)
y, x = np.mgrid[0:height, 0:width].astype(np.float32)
x, y = x / width, y / height
picture = np.empty((height, width, 3), np.float32)
for channel in range(3):
    a, b, c = random.uniform(-1, 1, 3)
    picture[..., channel] = a * x + b * y + c
    for _ in range(6):
        (cx, cy), size, gain = random.uniform(0, 1, 2), random.uniform(.02, .2), random.uniform(-2, 2)
        picture[..., channel] += gain * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / size ** 2)
picture -= picture.min()
pixels = (picture / picture.max() * 255).astype(np.uint8)
Image.fromarray(pixels).save(path, "JPEG", quality=90)
"""


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    made_from = digest(_PAINTER)
    directory = cache_root() / "images" / f"{width}x{height}-{seed}-{made_from}"

    def build(root: Path) -> None:
        size = [str(width), str(height), str(seed)]
        run([venv_python(base_environment()), "-c", _PAINTER, *size, root / "image.jpg"])

    return (build_once(directory, made_from, build) / "image.jpg").read_bytes()

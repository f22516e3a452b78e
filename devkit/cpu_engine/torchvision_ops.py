"""Defines the operator schemas torchvision's import expects, if its compiled part did not load.

pip gives torchvision built for CUDA; beside a CPU build of torch its C++ operators do not load, and the
import then fails on their schemas. The engine needs torchvision to import, not these operators.
"""

# Runs inside the environments only, where torch and torchvision are.
# mypy: ignore-errors

from __future__ import annotations

import torch
import torchvision.extension

LIBRARY = None  # keeps the definitions alive

if not torchvision.extension._has_ops():
    LIBRARY = torch.library.Library("torchvision", "DEF")
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

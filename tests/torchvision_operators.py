"""Plugin for LPIPS's tests beside a torch without CUDA: ``pytest -p tests.torchvision_operators``.

A torchvision built for CUDA registers two operators in a library that such a torch cannot load, and then fails to
import. Their declarations are all that LPIPS needs of them.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # declarations live as long as this object
for _operator in ("nms", "qnms"):
    _LIBRARY.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

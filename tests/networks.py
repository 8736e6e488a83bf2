"""torchvision, as tests import it."""

import torch

try:
    import torchvision
except RuntimeError:  # torchvision for CUDA with PyTorch for CPUs lacks its operators, which only detection uses
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]

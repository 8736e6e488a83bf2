"""torchvision, for tests, also where its version for CUDA meets PyTorch for CPUs."""

import torch

try:
    import torchvision
except RuntimeError:  # it lacks its operators, which only detection uses
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]

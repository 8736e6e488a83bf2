"""The networks that are trained. `layers` makes the normalization layer for a number of channels."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

Layers = Callable[[int], nn.Module]


def mlp(layers: Layers, inputs: int, width: int, hidden: int, classes: int) -> nn.Sequential:
    """Return linear layers, all but the last followed by a norm and ReLU."""
    parts: list[nn.Module] = [nn.Flatten()]
    for _ in range(hidden):
        parts += [nn.Linear(inputs, width, bias=False), layers(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(width, classes))


# Channels of each 3 x 3 convolution, divided by the width, and whether pooling halves the maps after it.
VGG = {
    4: ((1, True), (2, True), (4, False), (4, False)),
    8: ((1, False), (1, True), (2, False), (2, True), (4, False), (4, True), (8, False), (8, False)),
}


def vgg(layers: Layers, width: int, convolutions: int, classes: int) -> nn.Sequential:
    """Return 4 or 8 convolutions, each followed by a norm and ReLU."""
    parts: list[nn.Module] = []
    inputs = 3
    for factor, halved in VGG[convolutions]:
        outputs = factor * width
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), layers(outputs), nn.ReLU()]
        if halved:
            parts.append(nn.MaxPool2d(2))
        inputs = outputs
    return nn.Sequential(*parts, *_head(inputs, classes))


def resnet(width: int, blocks: int, classes: int) -> nn.Sequential:
    """Return bottleneck blocks in three stages, with batch normalization everywhere."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(3):
        for block in range(blocks):
            parts.append(Bottleneck(inputs, width * 2**stage, stride=2 if stage and not block else 1))
            inputs = Bottleneck.EXPANSION * width * 2**stage
    return nn.Sequential(*parts, *_head(inputs, classes))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with a shortcut."""

    EXPANSION = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.EXPANSION * width
        convolution = partial(nn.Conv2d, bias=False)
        self.residual = nn.Sequential(
            *(convolution(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU()),
            *(convolution(width, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(convolution(width, outputs, 1), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)).relu()


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]

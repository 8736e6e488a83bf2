"""Experiment 2: conditioning of layer inputs and of the Gauss-Newton matrix of a small perceptron through training."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from polywhiten.analysis import condition_number, covariance
from polywhiten.cli.demo.data import load_digits
from polywhiten.cli.demo.training import MOMENTUM
from study.fitting import scaled_lr
from study.networks import mlp
from study.norms import Norm, bn, dbn, gn, gw, iter_norm, layer
from study.runs import Experiment, Place, Progress, Run

SIZES = {
    "tiny": {"width": 16, "inputs": 16, "probe": 16, "steps": 10},  # a quick trial
    "small": {"width": 16, "inputs": 16, "probe": 128, "steps": 300},
    "large": {"width": 32, "inputs": 64, "probe": 512, "steps": 1000},
}
HIDDEN, BATCH_SIZE = 3, 64
GROUP_WIDTH = 8  # of GN and GW: means of 0 remove an eighth of the dimensions, and FRACTION ignores more than that
MEASURED_AT = (0, 10, 30, 100, 300, 1000)
FRACTION = 0.8  # of the eigenvalues: a dead unit and a weight's scale that a norm cancels have eigenvalues of 0
FISHER_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class ConditioningSettings(Norm):
    """The network and its training on scikit-learn's digits."""

    width: int
    inputs: int  # pixels
    probe: int  # images in the batch that the matrices are computed for
    batch_size: int
    lr: float
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Conditioning(ConditioningSettings, Run):
    """Condition numbers after the steps `measured_at`; those of several layers are geometric means.

    A full condition number divides the largest eigenvalue by the smallest one, a partial one by the eigenvalue that a
    fraction of all eigenvalues reach.
    """

    measured_at: tuple[int, ...]
    losses: tuple[float, ...]  # on the probe
    inputs_full: tuple[float, ...]  # of the covariance of the inputs of all linear layers but the first
    inputs_partial: tuple[float, ...]  # with FRACTION
    outputs_full: tuple[float, ...]  # of the covariance of the norms' outputs
    outputs_partial: tuple[float, ...]
    gauss_newton_partial: tuple[float, ...]  # for all parameters, with FISHER_FRACTION


def plan(size: str, seeds: int) -> list[list[ConditioningSettings]]:
    """Return the settings of all runs, a list for each seed."""
    fixed = SIZES[size] | {"batch_size": BATCH_SIZE, "lr": scaled_lr(BATCH_SIZE)}
    num_groups = fixed["width"] // GROUP_WIDTH
    norms = (bn(), dbn(0), iter_norm(0), gw(num_groups), gn(num_groups))
    return [[ConditioningSettings(**vars(norm), **fixed, seed=seed) for norm in norms] for seed in range(seeds)]


def perform(settings: ConditioningSettings, place: Place) -> Iterator[Progress]:
    """Train a network, and measure it in between. The data come with scikit-learn."""
    device = place.device
    x, y, classes = digits(settings.inputs, device)
    probe = x[: settings.probe], y[: settings.probe]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers = partial(layer, settings, dimensions=2)
        model = mlp(layers, settings.inputs, settings.width, HIDDEN, classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=MOMENTUM)
    random = np.random.default_rng(settings.seed)
    found = []
    for step in range(settings.steps + 1):
        if step in MEASURED_AT:
            found.append((step, *measures(model, *probe)))
        yield step / settings.steps, None
        batch = torch.from_numpy(random.choice(len(x), settings.batch_size, replace=False)).to(device)
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = "measured_at", "losses", "inputs_full", "inputs_partial", "outputs_full", "outputs_partial"
    yield 1.0, dict(zip((*names, "gauss_newton_partial"), zip(*found, strict=True), strict=True))


def digits(inputs: int, device: str) -> tuple[Tensor, Tensor, int]:
    """Return images with this number of pixels as rows, in an order that mixes the classes, and their classes."""
    data = load_digits()
    x = torch.from_numpy(data.x_train).permute(0, 3, 1, 2)
    x = avg_pool2d(x, math.isqrt(x[0].numel() // inputs)).flatten(1)
    return x.to(device), torch.from_numpy(data.y_train).to(device), data.classes


def measures(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Return the fields of `Conditioning` after `measured_at`, in float64 and with the statistics of this batch."""
    model = copy.deepcopy(model).double().train()
    x = x.double()
    inputs, outputs = [], []
    for before, part in zip([None, *model], model, strict=False):
        if isinstance(part, nn.Linear) and isinstance(before, nn.ReLU):
            part.register_forward_pre_hook(lambda _, arguments: inputs.append(covariance(arguments[0].detach())))
        if isinstance(before, nn.Linear):
            part.register_forward_hook(lambda _, __, output: outputs.append(covariance(output.detach())))
    scores = model(x)
    loss = cross_entropy(scores, y).item()
    if not math.isfinite(loss):
        return (loss,) + (math.nan,) * 5
    matrix = gauss_newton(scores, list(model.parameters()))
    layers = [(matrices, fraction) for matrices in (inputs, outputs) for fraction in (1.0, FRACTION)]
    values = [condition_number(torch.stack(m), fraction=f).log().mean().exp().item() for m, f in layers]
    return loss, *values, condition_number(matrix, fraction=FISHER_FRACTION).item()


def gauss_newton(scores: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return the Gauss-Newton matrix of the mean cross-entropy, which is also the Fisher matrix.

    It is the mean over the samples of J' (diag(p) - p p') J, where J is the Jacobian of the scores and p are the
    probabilities. It is computed as a product of rows, one per score and sample, by diag(p) - p p' = L L' with
    L = diag(s) - p s', where s are the square roots of p.
    """
    count, classes = scores.shape
    p = scores.detach().softmax(1)
    factors = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    rows = []
    for sample in range(count):
        for column in range(classes):
            direction = torch.zeros_like(scores)
            direction[sample] = factors[sample, :, column]
            gradients = torch.autograd.grad(scores, parameters, direction, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    stacked = torch.stack(rows)
    return stacked.T @ stacked / count


EXPERIMENT = Experiment(
    "conditioning",
    "Conditioning of layer inputs and of the Gauss-Newton matrix through training.",
    ConditioningSettings,
    Conditioning,
    plan,
    perform,
    sizes=("tiny", "small", "large"),
    seeds={},
    needs_pictures=False,
)

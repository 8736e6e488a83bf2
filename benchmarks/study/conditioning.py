"""Experiment 2: conditioning of layer inputs and of the Gauss-Newton matrix of a small perceptron through training."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from study.pictures import Source
from study.runs import Experiment, Run

SIZES = {
    "tiny": {"width": 16, "inputs": 16, "probe": 16, "steps": 10},  # tries it
    "small": {"width": 16, "inputs": 16, "probe": 128, "steps": 300},
    "large": {"width": 32, "inputs": 64, "probe": 512, "steps": 1000},
}
HIDDEN, BATCH_SIZE = 3, 64
GROUP_WIDTH = 8  # of GN and GW: means of 0 take an eighth of the dimensions, and FRACTION leaves out more
MEASURED_AT = (0, 10, 30, 100, 300, 1000)
FRACTION = 0.8  # of the eigenvalues: a dead unit, or a weight's scale that a norm takes out, has an eigenvalue of 0
FISHER_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class ConditioningSettings(Norm):
    """What is trained, on scikit-learn's digits."""

    width: int
    inputs: int  # pixels
    probe: int  # pictures that the matrices are of, in one batch
    batch_size: int
    lr: float
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Conditioning(ConditioningSettings, Run):
    """Condition numbers after some steps; of layers, their geometric mean."""

    measured_at: tuple[int, ...]
    losses: tuple[float, ...]  # of the probe
    inputs_full: tuple[float, ...]  # covariance of the inputs of all linear layers but the first
    inputs_partial: tuple[float, ...]  # over the eigenvalue that FRACTION of all are no smaller than
    outputs_full: tuple[float, ...]  # covariance of what the norms give
    outputs_partial: tuple[float, ...]
    gauss_newton_partial: tuple[float, ...]  # of all parameters; by FISHER_FRACTION


def plan(size: str, seeds: int) -> list[ConditioningSettings]:
    """All of one seed before the next."""
    fixed = SIZES[size] | {"batch_size": BATCH_SIZE, "lr": scaled_lr(BATCH_SIZE)}
    num_groups = fixed["width"] // GROUP_WIDTH
    norms = (bn(), dbn(0), iter_norm(0), gw(num_groups), gn(num_groups))
    return [ConditioningSettings(**vars(norm), **fixed, seed=seed) for seed in range(seeds) for norm in norms]


def perform(
    settings: ConditioningSettings, progress: Callable[[float], None], source: Source, device: str
) -> dict[str, Any]:
    """Train, and measure on the way; the data is bundled, so that `source` stays untouched."""
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
        progress(step / settings.steps)
        batch = torch.from_numpy(random.choice(len(x), settings.batch_size, replace=False)).to(device)
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = "measured_at", "losses", "inputs_full", "inputs_partial", "outputs_full", "outputs_partial"
    return dict(zip((*names, "gauss_newton_partial"), zip(*found, strict=True), strict=True))


def digits(inputs: int, device: str) -> tuple[Tensor, Tensor, int]:
    """Pictures of so many pixels, one at a row, in an order that mixes the classes; and their classes."""
    data = load_digits()
    x = torch.from_numpy(data.x_train).permute(0, 3, 1, 2)
    x = avg_pool2d(x, math.isqrt(x[0].numel() // inputs)).flatten(1)
    return x.to(device), torch.from_numpy(data.y_train).to(device), data.classes


def measures(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[float, ...]:
    """In float64, by the statistics of this one batch: what `Conditioning` lists after the step."""
    model = copy.deepcopy(model).double().train()
    x = x.double()
    inputs, outputs = [], []
    for before, part in zip([None, *model], model, strict=False):
        if isinstance(part, nn.Linear) and isinstance(before, nn.ReLU):
            part.register_forward_pre_hook(lambda _, given: inputs.append(covariance(given[0].detach())))
        if isinstance(before, nn.Linear):
            part.register_forward_hook(lambda _, __, given: outputs.append(covariance(given.detach())))
    scores = model(x)
    loss = cross_entropy(scores, y).item()
    if not math.isfinite(loss):
        return (loss,) + (math.nan,) * 5
    matrix = gauss_newton(scores, list(model.parameters()))
    layers = [(matrices, fraction) for matrices in (inputs, outputs) for fraction in (1.0, FRACTION)]
    values = [condition_number(torch.stack(m), fraction=f).log().mean().exp().item() for m, f in layers]
    return loss, *values, condition_number(matrix, fraction=FISHER_FRACTION).item()


def gauss_newton(scores: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Of the mean cross-entropy, which makes it the Fisher matrix too: the mean of J' (diag(p) - p p') J.

    One row a score and sample: diag(p) - p p' = L L' with L = diag(s) - p s' and s the roots of p.
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
    needs_pictures=False,
)

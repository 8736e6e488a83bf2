"""Freeze the running averages of a network's whitening layers, for fine-tuning."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from polywhiten import checks
from polywhiten.torch._internals import BatchNorm
from polywhiten.torch.modules import IterNorm

Model = TypeVar("Model", bound=nn.Module)


def freeze_stats(model: Model, frozen: bool = True) -> Model:
    """Freeze the running averages of a network's whitening layers, while their weights and biases are trained.

    The layers whiten by their running averages, which no longer change, also after `model.train()`. This is what
    `trainable=False` does to Keras' BatchNormalization, except that weight and bias are still trained.

    Parameters
    ----------
    model : Module
        The network, or a part of it. Of its layers, each `IterNorm` with running averages is frozen.
    frozen : bool
        Whether to freeze them. False undoes that: the layers take the mode of `model` again. A layer that is itself
        the `model` stays in evaluation mode until its `train()` is called.

    Returns
    -------
    Module
        The model itself.

    Raises
    ------
    TypeError
        `model` isn't a module or `frozen` isn't a bool.

    Warns
    -----
    UserWarning
        There is nothing to freeze, or the network has batch normalization too, which stays as it is.

    Notes
    -----
    Frozen layers show `frozen_stats=True` in their `repr`. The attribute survives `copy.deepcopy` and pickling. It is
    no part of the `state_dict`.

    Use a smaller learning rate than in training: constant statistics don't scale activations back after a large step.

    PyTorch's batch normalization has no such attribute, and `model.train()` sets it to training mode. To freeze it too,
    replace it first: `convert(model, "iter_norm", group_size=1)` computes the same. To keep weights and biases
    constant, use their `requires_grad_(False)`.

    Examples
    --------
    >>> import torch
    >>> from polywhiten.torch import IterNorm, freeze_stats
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), IterNorm(8))
    >>> y = model(torch.randn(64, 8))
    >>> model = freeze_stats(model).train()
    >>> model.training, model[1].training
    (True, False)
    >>> model = freeze_stats(model, False)
    >>> model[1].training
    True
    """
    if not isinstance(model, nn.Module):
        raise checks.wrong_type(model, "model", "a torch.nn.Module")
    if not isinstance(frozen, bool):
        raise TypeError(f"frozen is {frozen!r}: True or False is needed")
    layers = [layer for layer in model.modules() if isinstance(layer, IterNorm)]
    if frozen:
        layers = [layer for layer in layers if layer.running_mean is not None]
    for layer in layers:
        layer.frozen_stats = frozen
        layer.train(model.training)
    if not frozen:
        return model
    if not layers:
        warnings.warn("nothing to freeze: the model has no IterNorm with running averages", stacklevel=2)
    others = [
        name or type(layer).__name__
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNorm) and layer.running_mean is not None
    ]
    if others:
        number = f", the first of {len(others)} such layers," if len(others) > 1 else ""
        warnings.warn(
            f"batch normalization isn't frozen: layer {others[0]!r}{number} still takes the statistics of its batch in "
            'training; convert(model, "iter_norm", group_size=1) replaces it by a layer that can be frozen',
            stacklevel=2,
        )
    return model

"""A fitted whitening of embeddings as modules of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polywhiten import checks
from polywhiten.embeddings.exported_map import exported_map

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening


class UnitLength(nn.Module):
    """Divide each row by its length; rows of zeros stay as they are.

    Examples
    --------
    >>> import torch
    >>> from polywhiten.torch import UnitLength
    >>> UnitLength()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x, of shape (..., channels), with its last axis of unit length."""
        # the length of a row of float16 may be beyond float16, and bfloat16 would round it to three digits
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        return (x / torch.where(length > 0, length, 1)).to(x.dtype)


def linear(whitening: Whitening, dtype: torch.dtype = torch.float32) -> nn.Linear | nn.Sequential:
    """Return a fitted whitening as a linear layer, which computes what `whitening.transform` computes.

    Parameters
    ----------
    whitening : Whitening
        The fitted estimator of d features, with outputs of k features.
    dtype : torch.dtype
        The layer's dtype: float32, float64, float16 or bfloat16.

    Returns
    -------
    Linear, or Sequential
        A `torch.nn.Linear` from d to k features on the CPU, for inputs (..., d). With `normalize=True`, a
        `torch.nn.Sequential` of it and `UnitLength`. The parameters have `requires_grad=False`, so that training the
        model around them leaves the whitening as it is; `requires_grad_()` of the layer changes that.

    Raises
    ------
    TypeError
        `whitening` isn't a `polywhiten.Whitening`, or `dtype` isn't a real floating dtype.
    ValueError
        The dtype can't hold the map, as its entries are too large or too small.
    sklearn.exceptions.NotFittedError
        The whitening isn't fitted.

    Notes
    -----
    The layer computes W x + b, whereas `transform` computes W (x - m). The bias b is computed in float64 and rounded
    once, but the sum W x + b cancels if the mean is far from 0: the page `docs/embeddings-deploy.md` says how many
    digits this costs.

    Examples
    --------
    >>> import numpy as np, torch, polywhiten
    >>> from polywhiten.torch import linear
    >>> x = np.random.default_rng(0).normal(size=(500, 4)) @ np.triu(np.ones((4, 4)))
    >>> whitening = polywhiten.Whitening("pca", n_components=2).fit(x)
    >>> layer = linear(whitening)
    >>> layer
    Linear(in_features=4, out_features=2, bias=True)
    >>> y = layer(torch.from_numpy(x).float())
    >>> np.allclose(y.numpy(), whitening.transform(x), atol=1e-5)
    True
    """
    if not isinstance(dtype, torch.dtype):
        raise checks.wrong_type(dtype, "dtype", "a torch.dtype such as torch.float32")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(
            f"dtype={dtype} is no dtype for a linear layer: use torch.float32, float64, float16 or bfloat16"
        )
    exported = exported_map(whitening, torch.finfo(dtype))
    outputs, inputs = exported.weight.shape
    # without initialization, which would take numbers from the random generator
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype)
    layer.requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(exported.weight))
    layer.bias.copy_(torch.from_numpy(exported.bias))
    return nn.Sequential(layer, UnitLength()) if exported.normalize else layer

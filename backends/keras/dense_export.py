"""A fitted whitening of embeddings as Keras' own layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from polywhiten.embeddings.exported_map import exported_map

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening

Layer = Any


def dense(whitening: Whitening, dtype: Any = None) -> Layer:
    """Returns a fitted whitening as a dense layer, which computes what `transform` computes.

    The layer isn't trainable, so that training a model around it leaves the
    whitening as it is. It consists of Keras' own layers alone: a saved model
    loads where polywhiten isn't installed.

    The layer computes `W x + b`, whereas `transform` computes `W (x - m)`. The
    bias is computed in float64 and rounded once, but the sum cancels if the mean
    is far from 0: the page `docs/embeddings-deploy.md` says how many digits this
    costs.

    Args:
        whitening: A fitted `polywhiten.Whitening` of `d` features, with outputs
            of `k` features.
        dtype: The dtype or dtype policy of the layer. Defaults to Keras' global
            policy.

    Returns:
        A `keras.layers.Dense`, built, for inputs `(..., d)` and outputs
        `(..., k)`. With `normalize=True`, a `keras.Sequential` of it and
        `keras.layers.UnitNormalization`, for inputs `(batch, d)`.
        Lengths are computed in float32 at least.

    Raises:
        TypeError: `whitening` isn't a `polywhiten.Whitening`.
        ValueError: The dtype can't hold the map, as its entries are too large or
            too small.
        sklearn.exceptions.NotFittedError: The whitening isn't fitted.

    Example:

    >>> import numpy as np
    >>> import polywhiten
    >>> from polywhiten.keras import dense
    >>> x = np.random.default_rng(0).normal(size=(500, 4)) @ np.triu(np.ones((4, 4)))
    >>> whitening = polywhiten.Whitening("pca", n_components=2).fit(x)
    >>> y = dense(whitening)(x.astype("float32"))
    >>> np.allclose(y, whitening.transform(x), atol=1e-5)
    True
    """
    policy = keras.dtype_policies.get(keras.config.dtype_policy() if dtype is None else dtype)
    variables = policy.variable_dtype
    exported = exported_map(whitening, np.finfo("float32" if variables == "bfloat16" else variables))  # the same range
    outputs, inputs = exported.weight.shape
    # by zeros, because others would take numbers from Keras' random generator
    layer = keras.layers.Dense(outputs, kernel_initializer="zeros", dtype=policy, trainable=False)
    layer.build((None, inputs))
    layer.set_weights([exported.weight.T, exported.bias])
    if not exported.normalize:
        return layer
    # in float16, its squares overflow, and zeros become NaN
    lengths = "float64" if policy.compute_dtype == "float64" else "float32"
    unit_length = keras.layers.UnitNormalization(dtype=lengths)
    return keras.Sequential([keras.Input((inputs,), dtype=policy.compute_dtype), layer, unit_length])

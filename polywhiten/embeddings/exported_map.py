"""The affine map that a fitted whitening is exported as, checked for the dtype that will hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from polywhiten import checks
from polywhiten.moments import Float64

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening


class FloatLimits(Protocol):
    """The range of a floating dtype, as `numpy.finfo` and `torch.finfo` have it."""

    @property
    def dtype(self) -> Any: ...
    @property
    def max(self) -> Any: ...
    @property
    def tiny(self) -> Any: ...


class ExportedMap(NamedTuple):
    """The map from x to weight @ (x - center) + bias, in float64, and whether outputs are then divided by their length.

    Attributes
    ----------
    weight : ndarray of shape (k, d)
        The whitening matrix, which includes the factor that integer embeddings are multiplied by (`scale`).
    bias : ndarray of shape (k,)
        What is added to the product.
    center : ndarray of shape (d,)
        What is subtracted from the input: zeros, or the mean rounded to float32.
    normalize : bool
        Whether outputs are divided by their length; those of length 0 stay.
    """

    weight: Float64
    bias: Float64
    center: Float64
    normalize: bool


def exported_map(whitening: Whitening, limits: FloatLimits, *, centered: bool = False) -> ExportedMap:
    """Return the map of a fitted whitening.

    With `centered`, the map subtracts the mean first. The bias is then only the product of the weight with what
    rounding to float32 takes from the mean, so that means far above the deviations cost no digits.

    Raises
    ------
    TypeError
        The object isn't a `polywhiten.Whitening`.
    ValueError
        The dtype can't hold the map, because its entries are too large or too small.
    """
    from polywhiten.embeddings.whitening import Whitening  # not earlier: it imports scikit-learn

    if not isinstance(whitening, Whitening):
        raise checks.wrong_type(whitening, "whitening", "a fitted polywhiten.Whitening")
    weight, bias = whitening.affine_map()
    row_map, scale = whitening._fitted_map(), whitening._recipe.read.scale  # parameters may have been set since `fit`
    center = np.zeros_like(row_map.mean)
    if centered:
        mean = row_map.mean if scale is None else row_map.mean / scale
        with np.errstate(over="ignore", invalid="ignore"):  # the check below finds what this makes infinite
            center = mean.astype(np.float32).astype(np.float64)
            bias = bias + weight @ center
    _check_range(weight, bias, limits)
    return ExportedMap(weight, bias, center, row_map.normalize)


def _check_range(weight: Float64, bias: Float64, limits: FloatLimits) -> None:
    largest, largest_bias = np.abs(weight).max(), np.abs(bias).max()
    is_lost = 0 < largest < limits.tiny  # the weight of constant data is 0
    if is_lost or not np.maximum(largest, largest_bias) <= limits.max:  # the bias may be NaN
        raise ValueError(
            f"the whitening can't be exported in {limits.dtype}, which holds numbers from {limits.tiny:.0e} to "
            f"{limits.max:.0e}: the largest entry of its weight is {largest:.0e}, that of its bias {largest_bias:.0e}. "
            "Choose another dtype if you can, or multiply the embeddings by a constant before you fit and transform"
        )

"""Group whitening with its weight and bias on the way, of which each value belongs to some samples of a block."""

from __future__ import annotations

import math

from polywhiten._types import Array
from polywhiten.blocks import SampleGroups
from polywhiten.compiled.calls import Calls
from polywhiten.compiled.panels import Channels
from polywhiten.kernels import Kernels, Term
from polywhiten.whitening import Plan, Statistics, as_dtype_of, gradient_terms


class WholeGroupWhitening:
    """Of an array x, which the compiled kernels serve."""

    def __init__(self, kernels: Kernels, calls: Calls, plan: Plan, x: Array) -> None:
        assert isinstance(plan.blocks, SampleGroups)
        self._kernels, self._calls, self._plan = kernels, calls, plan
        self._x = kernels.split(plan.blocks, x)
        axis = plan.blocks.axis
        self._channels = Channels(x.shape[axis], math.prod(x.shape[axis + 1 :]))

    def forward(self, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
        """Y, split into blocks, and the statistics."""
        mean, cov = self._calls.moments(self._x, 0)
        whitener = self._kernels.inverse_sqrt(self._plan.solver, cov, self._plan.eps)
        terms = [Term(whitener, self._x, mean)]
        y = self._calls.affine_map(terms, None, 0, self._channels, after=self._values(weight), bias=self._values(bias))
        return y, Statistics(mean, cov, whitener)

    def backward(
        self, weight: Array | None, bias: Array | None, stats: Statistics, dy: Array
    ) -> tuple[Array, Array | None, Array | None]:
        """As `polywhiten.whitening.backward`."""
        mean, cov, whitener = stats
        values = self._values(weight)
        if weight is None and bias is None:
            s, k = self._calls.cross_moments(dy, self._x, mean, 0)
            dweight = dbias = None
        else:
            s, k, dweight, dbias = self._calls.cross_moments_of_channels(
                dy, self._x, mean, whitener, values, self._channels
            )
        ds = self._kernels.inverse_sqrt_adjoint(self._plan.solver, cov, k, self._plan.eps)
        count = self._kernels.sample_count(self._x, 0)
        terms = gradient_terms(self._kernels, whitener, dy, s, ds, self._x, mean, count)
        dx = self._calls.affine_map(terms, None, 0, self._channels, before=values)
        return dx, as_dtype_of(self._kernels, dweight, weight), as_dtype_of(self._kernels, dbias, bias)

    def _values(self, parameter: Array | None) -> Array | None:
        return None if parameter is None else self._kernels.xp.astype(parameter, self._x.dtype, copy=False)

"""What the core asks of a library of arrays: implementations of whitening, and how its arrays behave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace

from polywhiten import checks
from polywhiten._types import Array, Namespace
from polywhiten.blocks import join_channels, take_channels
from polywhiten.kernels import Kernels
from polywhiten.reference import Gradients, Reference
from polywhiten.solvers import Solver
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics, WhiteningStats, join_statistics

Pullback = Callable[[Array], Gradients]
Implementation = Reference  # an implementation inherits from the reference what it doesn't do faster


class Backend:
    """A library of arrays: its implementations, the fastest first, the plain one last.

    As it stands, it serves libraries that don't differentiate. One that does overrides `whiten_blocks`, and gives its
    framework `forward` and `backward` as an operation and its gradient.

    Parameters
    ----------
    kernels : Kernels
        The plain kernels, with the library's array namespace; every other implementation may leave arrays to them.
    *faster : Implementation
        Implementations that are asked before.
    """

    def __init__(self, kernels: Kernels, *faster: Implementation) -> None:
        self.kernels = kernels
        self.implementations: tuple[Implementation, ...] = (*faster, Reference(kernels))

    def implementation(self, spec: WhiteningSpec | None, x: Array, *others: Array | None) -> Implementation:
        """Return the first implementation that supports these arrays."""
        return next(each for each in self.implementations if each.supports(spec, x, *others))

    def kernels_for(self, cov: Array) -> Kernels:
        """Return the fastest kernels for covariances (..., d, d)."""
        return self.implementation(None, cov).kernels

    def whiten(self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None) -> Array:
        """Whiten an array, whose last group may be smaller than the others; differentiable if the library is."""
        return self._whiten_parts(spec, x, weight, bias)[0]

    def whiten_with_statistics(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, WhiteningStats]:
        """Like `whiten`, and return the statistics too, as layers need them for running averages."""
        y, stats = self._whiten_parts(spec, x, weight, bias)
        return y, join_statistics(self.kernels.xp, stats)

    def _whiten_parts(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, list[Statistics]]:
        parts = spec.equal_parts(x)
        if len(parts) == 1:
            y, one = self.whiten_blocks(parts[0][1], x, weight, bias)
            return y, [one]
        axis, outputs, stats = spec.blocks.axis, [], []
        for part, equal in parts:
            arrays = take_channels(x, part, axis), take_channels(weight, part), take_channels(bias, part)
            y, part_stats = self.whiten_blocks(equal, *arrays)
            outputs.append(y)
            stats.append(part_stats)
        return join_channels(self.kernels.xp, outputs, axis), stats

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Whiten an array of equal blocks, and return the statistics; differentiable if the library is."""
        return self.forward(spec, x, weight, bias)

    def forward(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Whiten an array of equal blocks by the first implementation that supports it."""
        return self.implementation(spec, x, weight, bias).forward(spec, x, weight, bias)

    def backward(
        self,
        spec: WhiteningSpec,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        stats: Statistics,
        dy: Array,
        dstats: Statistics = NO_STATISTICS,
    ) -> Gradients:
        """Return the gradients of `forward` by the first implementation that supports the arrays."""
        implementation = self.implementation(spec, x, weight, bias, dy, *stats, *dstats)
        return implementation.backward(spec, x, weight, bias, stats, dy, dstats)

    def vjp(self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Pullback]:
        """Whiten an array, and return the function that maps the gradient of the result to those of the arguments."""
        xp, axis, parts, outputs = self.kernels.xp, spec.blocks.axis, [], []
        for part, equal in spec.equal_parts(x):
            inputs = take_channels(x, part, axis), take_channels(weight, part), take_channels(bias, part)
            y, stats = self.forward(equal, *inputs)
            parts.append((part, equal, inputs, stats))
            outputs.append(y)

        def pullback(dy: Array) -> Gradients:
            dy = self.converted(dy, "dy", x)
            checks.check_gradient(xp, dy, x.shape)
            dy = xp.astype(dy, x.dtype, copy=False)
            gradients = [
                self.backward(equal, *inputs, stats, take_channels(dy, part, axis))
                for part, equal, inputs, stats in parts
            ]
            dxs, dweights, dbiases = zip(*gradients, strict=True)
            return (
                join_channels(xp, dxs, axis),
                None if weight is None else join_channels(xp, dweights),
                None if bias is None else join_channels(xp, dbiases),
            )

        return join_channels(xp, outputs, axis), pullback

    def statistics(self, spec: WhiteningSpec, x: Array) -> WhiteningStats:
        """Return the statistics of an array, whose last group may be smaller than the others."""
        stats = []
        for part, equal in spec.equal_parts(x):
            channels = take_channels(x, part, spec.blocks.axis)
            stats.append(self.implementation(equal, channels).statistics(equal, channels))
        return join_statistics(self.kernels.xp, stats)

    def apply_frozen(
        self, axis: int, x: Array, mean: Array, whitener: Array, weight: Array | None, bias: Array | None
    ) -> Array:
        """Return diag(weight) whitener (x - mean) + bias for mean (C,) and whitener (groups, d, d)."""
        arrays = x, mean, whitener, weight, bias
        return self.implementation(None, *arrays).apply_frozen(axis, *arrays)

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return (cov + eps I)^(-1/2) of matrices (..., d, d)."""
        return self.implementation(None, cov).inverse_sqrt(solver, cov, eps)

    def tensor(self, x: Array, name: str = "x") -> Array:
        """Return x, or the tensor that a framework's variable holds; raise an error with the argument's name."""
        return x

    def snapshot(self, state: Array, *inputs: Array | None) -> Array:
        """Return a layer's state, or a copy if it may change in place while the gradient of the inputs needs it."""
        return state

    def checked_affine(
        self, x: Array, axis: int, weight: Array | None, bias: Array | None
    ) -> tuple[Array | None, Array | None]:
        """Return weight and bias as arrays of x's library; raise an error if they haven't a value for each channel."""

        def checked(values: Array | None, name: str) -> Array | None:
            if values is not None:
                values = self.converted(values, name, x)
                checks.check_per_channel(self.kernels.xp, values, name, x.shape[axis])
            return values

        return checked(weight, "weight"), checked(bias, "bias")

    def in_memory_order(self, x: Array, axis: int) -> tuple[Array, int, Callable[[Array], Array]]:
        """Return a view of x with its axes as they lie in memory, its channel axis, and what restores a result's axes.

        This is for libraries whose arrays can be channels-last in memory alone.
        """
        return x, axis, lambda y: y

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """Return what came beside x as an array of its library, or raise TypeError with the argument's name.

        A library converts what its own functions convert, which here is nothing.
        """
        if namespace_of(values) is not self.kernels.xp:
            raise checks.wrong_type(values, name, "an array of the library that x is of")
        return values


def namespace_of(x: Any) -> Namespace | None:
    """Return the array API namespace of x, None if x is no array."""
    try:
        return array_namespace(x)
    except TypeError:
        return None

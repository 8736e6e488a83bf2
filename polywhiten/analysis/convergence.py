"""How far Newton's iteration has whitened a covariance after each of its steps."""

from __future__ import annotations

from bisect import bisect_left

from polywhiten._types import Array
from polywhiten.analysis.conditioning import checked_covariance, whitening_error
from polywhiten.checks import check_positive
from polywhiten.dispatch import backend_of
from polywhiten.solvers.newton import Newton

_MAX_ITERATIONS = 64  # more gain nothing, even in float64, for any covariance that can be whitened


def convergence(cov: Array, iterations: int) -> Array:
    r"""Compute the whitening error after each Newton step.

    After T steps the layers' whitener is W_T, and a whitened output has covariance W_T S W_T:

    .. math:: e_T = \lVert W_T S W_T - I \rVert_F / \sqrt d

    Parameters
    ----------
    cov : array, shape (..., d, d)
        S, symmetric positive definite, real floating point. The layers whiten a covariance + eps I.
    iterations : int
        The last T, 1 or more.

    Returns
    -------
    array, shape (..., iterations)
        Errors after 1, 2 ... T steps; in the dtype of cov, but float32 for half precision.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import convergence
    >>> convergence(np.diag([1.0, 0.1]), 6).round(3)
    array([0.571, 0.439, 0.247, 0.072, 0.006, 0.   ])
    """
    xp, cov = checked_covariance(cov)
    errors = [_error(cov, step) for step in range(1, check_positive("iterations", iterations) + 1)]
    return xp.concat([error[..., None] for error in errors], axis=-1)


def required_iterations(cov: Array, error: float) -> int:
    """Find the smallest T after which the whitening error e_T is no larger than `error`.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        S as for `convergence`. Of several matrices, the one that needs most steps counts.
    error : float
        The largest whitening error to accept, above 0.

    Raises
    ------
    ValueError
        64 steps aren't enough: cov is singular or not finite, or the dtype can't resolve so small an error.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import required_iterations
    >>> required_iterations(np.diag([1.0, 0.1]), 0.01), required_iterations(np.diag([1.0, 1e-5]), 0.01)
    (5, 17)
    """
    if not error > 0:
        raise ValueError(f"error={error} must be above 0")
    xp, cov = checked_covariance(cov)

    def largest(iterations: int) -> float:
        return float(xp.max(_error(cov, iterations)))

    if not largest(_MAX_ITERATIONS) <= error:  # also if it is NaN
        raise ValueError(
            f"error={error} isn't reached in {_MAX_ITERATIONS} steps, which leave {largest(_MAX_ITERATIONS):.2g}: "
            "add eps I to cov, or allow a larger error"
        )
    return 1 + bisect_left(range(1, _MAX_ITERATIONS + 1), True, key=lambda iterations: largest(iterations) <= error)


def _error(cov: Array, iterations: int) -> Array:
    whitener = backend_of(cov).inverse_sqrt(Newton(iterations), cov)
    return whitening_error(whitener @ cov @ whitener)

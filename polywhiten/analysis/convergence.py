"""How far Newton's iteration has whitened a covariance after each of its steps."""

from __future__ import annotations

from bisect import bisect_left

from polywhiten._types import Array
from polywhiten.analysis.conditioning import checked_covariance, whitening_error
from polywhiten.checks import check_positive
from polywhiten.dispatch import Backend
from polywhiten.solvers.newton import Newton

_MOST = 64  # past which float64 has nothing to gain for any covariance that can be whitened


def convergence(cov: Array, iterations: int) -> Array:
    r"""Whitening error after each of Newton's steps.

    After T steps the layers' whitener is W_T, and a whitened output has covariance W_T S W_T:

    .. math:: e_T = \lVert W_T S W_T - I \rVert_F / \sqrt d

    Parameters
    ----------
    cov : array, shape (..., d, d)
        S, symmetric positive definite, real floating point. The layers whiten a covariance + eps I.
    iterations : int
        T of the last error.

    Returns
    -------
    array, shape (..., iterations)
        Errors after 1, 2 ... T steps; in the dtype of cov, but float32 for half precision.

    Raises
    ------
    TypeError
        cov is no array, or has no real floating-point dtype.
    ValueError
        cov isn't square, or `iterations` is below 1.

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
    backend, cov = checked_covariance(cov)
    xp = backend.kernels.xp
    errors = [_error(backend, cov, step) for step in range(1, check_positive("iterations", iterations) + 1)]
    return xp.concat([error[..., None] for error in errors], axis=-1)


def required_iterations(cov: Array, error: float) -> int:
    """Newton's steps after which the whitening error is no larger than wanted.

    Parameters
    ----------
    cov : array, shape (..., d, d)
        As for `convergence`. Of several, the one that needs most steps counts.
    error : float
        Wanted whitening error, above 0.

    Returns
    -------
    int
        The smallest T with e_T <= error.

    Raises
    ------
    TypeError, ValueError
        As by `convergence`; and where 64 steps don't do, as for a singular or non-finite covariance, or an error below
        what the dtype can resolve.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import required_iterations
    >>> required_iterations(np.diag([1.0, 0.1]), 0.01), required_iterations(np.diag([1.0, 1e-5]), 0.01)
    (5, 17)
    """
    if not error > 0:
        raise ValueError(f"error={error} must be above 0")
    backend, cov = checked_covariance(cov)
    xp = backend.kernels.xp

    def left(iterations: int) -> float:
        return float(xp.max(_error(backend, cov, iterations)))

    if not left(_MOST) <= error:  # NaN neither
        raise ValueError(
            f"error={error} isn't reached in {_MOST} steps, which leave {left(_MOST):.2g}: add eps I to cov, "
            "or allow a larger error"
        )
    steps = range(1, _MOST + 1)
    return steps[bisect_left(steps, True, key=lambda iterations: left(iterations) <= error)]


def _error(backend: Backend, cov: Array, iterations: int) -> Array:
    whitener = backend.inverse_sqrt(Newton(iterations), cov)
    return whitening_error(whitener @ cov @ whitener)

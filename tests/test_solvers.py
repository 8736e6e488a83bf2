"""The solvers are accurate, and their derivatives right where automatic differentiation fails."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from polywhiten.solvers import regularized_solver, solver_for
from polywhiten.solvers.eigh import Eigh
from polywhiten.solvers.minimax import minimax_steps
from polywhiten.solvers.newton import Newton


def matrix(size, condition, seed=0):
    """Return a symmetric positive definite matrix whose eigenvalues are evenly spaced in logarithm."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    s = q * np.geomspace(1, 1 / condition, size) @ q.T
    return (s + s.T) / 2


def relative_error(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("iterations", [5, 10, 20, 50, 100])
@pytest.mark.parametrize(("condition", "bound"), [(1e2, 1e-5), (1e4, 5e-4), (1e6, 5e-2)])
def test_newton_is_stable_for_every_number_of_iterations(iterations, condition, bound):
    cov, solver = matrix(64, condition), Newton(iterations)
    grad = np.random.default_rng(1).normal(size=cov.shape)
    single = cov.astype("float32")
    assert relative_error(solver.inverse_sqrt(xp, single), solver.inverse_sqrt(xp, cov)) < bound
    expected = solver.adjoint(xp, cov, grad)
    assert relative_error(solver.adjoint(xp, single, grad.astype("float32")), expected) < bound


@pytest.mark.parametrize(("iterations", "reach"), [(3, 88), (4, 1.5e3), (5, 2.7e4), (6, 4.9e5), (7, 8.9e6), (8, 1e8)])
def test_minimax_whitens_up_to_the_documented_condition(iterations, reach):
    large = np.linspace(1, 2, 15)
    cov = 7e-3 * np.diag([*large, 1.01 * np.linalg.norm(large) / reach])
    w = solver_for("minimax", iterations).inverse_sqrt(xp, cov)
    assert np.max(np.abs(w @ cov @ w - np.eye(16))) < 2.1e-4


def test_minimax_adds_digits_once_every_condition_is_reached():
    cov = matrix(8, 1e4)
    w = solver_for("minimax", 12).inverse_sqrt(xp, cov)
    assert np.max(np.abs(w @ cov @ w - np.eye(8))) < 1e-9


@pytest.mark.parametrize(("iterations", "condition"), [(3, 30), (4, 500), (5, 1e4), (6, 1e5), (7, 1e6), (8, 1e7)])
def test_the_gradient_of_minimax_is_that_of_the_inverse_square_root(iterations, condition):
    cov, rng = matrix(16, condition), np.random.default_rng(1)
    for grad in rng.normal(size=(5, 16, 16)):
        gradient = solver_for("minimax", iterations).adjoint(xp, cov, grad)
        assert relative_error(gradient, Eigh().adjoint(xp, cov, grad)) < 1e-7


def test_more_steps_than_a_dtype_has_digits_for_change_nothing():
    cov = matrix(8, 1e3)
    for dtype in ("float32", "float64"):
        given = cov.astype(dtype)
        for method, most in (("newton", 47), ("minimax", 8)):
            w = solver_for(method, most).inverse_sqrt(xp, given)
            assert w.dtype == dtype
            np.testing.assert_array_equal(solver_for(method, 10_000).inverse_sqrt(xp, given), w)


@pytest.mark.parametrize("iterations", [1, 3, 5, 8])
def test_a_minimax_step_is_the_best_quintic(iterations):
    """By Chebyshev, the best polynomial's error reaches its maximum at four points, with alternating sign."""
    steps, lower, upper = minimax_steps(iterations), None, 1.0
    assert len(steps) == iterations
    for a, b, c in steps:
        roots = np.sort(np.roots([5 * c, 0, 3 * b, 0, a]).real)
        minimum_and_maximum = [1 - (a * x + b * x**3 + c * x**5) for x in roots[roots > 0]]
        largest = abs(minimum_and_maximum[0])
        if largest < 1e-6:  # converged to the limit
            break
        np.testing.assert_allclose(minimum_and_maximum, [-largest, largest], rtol=1e-6)
        assert 1 - (a * upper + b * upper**3 + c * upper**5) == pytest.approx(-largest, rel=1e-6)
        if lower is not None:
            assert 1 - (a * lower + b * lower**3 + c * lower**5) == pytest.approx(largest, rel=1e-6)
        lower, upper = 1 - largest, 1 + largest


@pytest.mark.parametrize("relative", [False, True])
def test_eigh_differentiates_equal_eigenvalues_twice(relative):
    solver, _ = regularized_solver("eigh", None, 0.1, relative)
    rng = np.random.default_rng(0)
    grad, direction, third = ((m + m.T) / 2 for m in rng.normal(size=(3, 5, 5)))
    cov, step = np.diag([2.0, 2.0, 2.0, 1.0, 1.0]), 1e-5

    def slope(function, at, along):
        return (function(at + step * along) - function(at - step * along)) / (2 * step)

    value = lambda s: np.sum(grad * solver.inverse_sqrt(xp, s))
    assert np.sum(solver.adjoint(xp, cov, grad) * direction) == pytest.approx(
        slope(value, cov, direction), rel=1e-8, abs=1e-9
    )
    dcov, dgrad = solver.adjoint_vjp(xp, cov, grad, direction)
    of_cov = lambda s: np.sum(solver.adjoint(xp, s, grad) * direction)
    of_grad = lambda g: np.sum(solver.adjoint(xp, cov, g) * direction)
    assert np.sum(dcov * third) == pytest.approx(slope(of_cov, cov, third), rel=1e-8, abs=1e-9)
    assert np.sum(dgrad * third) == pytest.approx(slope(of_grad, grad, third), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    ("solver", "of_float32", "of_float64"),
    [
        (Newton(5), 5, 5),
        (Newton(12), 12, 12),
        (Newton(13), None, 13),  # float32 would lose too many bits
        (Newton(47), None, 47),
        (Newton(48), None, None),  # the last step would change nothing
        (solver_for("minimax", 5), None, None),
        (Eigh(), None, None),
        (regularized_solver("newton", 5, 1e-5, True)[0], None, None),
    ],
    ids=str,
)
def test_a_solver_says_which_newton_steps_give_its_result(solver, of_float32, of_float64):
    assert solver.newton_steps(4) == of_float32
    assert solver.newton_steps(8) == of_float64


def test_eigenvalues_that_rounding_made_negative_stay_out():
    cov = np.diag(np.float32([1e6, -1e-4]))
    w = Eigh().inverse_sqrt(xp, cov)
    assert np.all(np.isfinite(w))
    assert w[1, 1] == pytest.approx(1 / np.sqrt(1e6 * np.finfo("float32").eps), rel=1e-5)

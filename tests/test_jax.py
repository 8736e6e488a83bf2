"""What JAX does with the functions: they trace and differentiate as any of its own."""

import numpy as np
import pytest

import polywhiten as pw

jax = pytest.importorskip("jax")


@pytest.mark.parametrize("method", ["newton", "eigh", "minimax"])
def test_jit_grad_and_vmap(method):
    jax.config.update("jax_enable_x64", True)
    xs = jax.random.normal(jax.random.key(0), (3, 8, 6, 4), dtype="float64")

    def loss(x):
        return (pw.iter_norm(x, group_size=4, method=method) ** 3).sum()

    gradients = jax.jit(jax.vmap(jax.grad(loss)))(xs)
    for x, gradient in zip(xs, gradients, strict=True):
        y, pullback = pw.iter_norm_vjp(x, group_size=4, method=method)
        np.testing.assert_allclose(gradient, pullback(3 * y**2)[0], atol=1e-9)

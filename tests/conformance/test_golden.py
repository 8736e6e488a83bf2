"""Outputs and gradients agree with those of the modules that the papers' authors published."""

from pathlib import Path

import numpy as np
import pytest

import polywhiten as pw

GOLDEN = Path(__file__).parent.parent / "golden"
EXACT = 1e-10


def case(file, number):
    with np.load(GOLDEN / file) as pack:
        prefix = f"case{number:02}_"
        return {k.removeprefix(prefix): pack[k] for k in pack.files if k.startswith(prefix)}


@pytest.mark.parametrize("number", range(18))
def test_iter_norm(library, number):
    c = case("iter_norm.npz", number)
    arguments = {"group_size": int(c["group_size"]), "iterations": int(c["iterations"])}
    affine = {"weight": c["weight"], "bias": c["bias"]}
    y, gradients = library.vjp("iter_norm", c["dy"], x=c["x"], **affine, **arguments)
    for actual, expected in zip((y, *gradients), (c["y"], c["dx"], c["dweight"], c["dbias"]), strict=True):
        np.testing.assert_allclose(actual, expected.reshape(actual.shape), atol=EXACT)
    stats = pw.whitening_stats(library.array(c["x"]), **arguments)
    running = {
        "mean": 0.1 * library.numpy(stats.mean),
        "whitener": 0.9 * np.eye(stats.whitener.shape[-1]) + 0.1 * library.numpy(stats.whitener),
    }
    for name, value in running.items():
        np.testing.assert_allclose(value, c[f"running_{name}"].reshape(value.shape), atol=EXACT)
    frozen = pw.WhiteningStats(library.array(running["mean"]), None, library.array(running["whitener"]))
    y_eval = library.call("apply_whitening", x=c["x"], stats=frozen, **affine)
    np.testing.assert_allclose(y_eval, c["y_eval"], atol=EXACT)


@pytest.mark.parametrize("number", range(18))
def test_layer_after_one_step(layers, number):
    c = case("iter_norm.npz", number)
    api = layers.value.layers
    layer = api.iter_norm(
        c["x"].shape[1], group_size=int(c["group_size"]), iterations=int(c["iterations"]), affine=False
    )
    affine = [c[name].reshape(1, -1, 1, 1) for name in ("weight", "bias")]
    np.testing.assert_allclose(api.train(layer, c["x"]) * affine[0] + affine[1], c["y"], atol=EXACT)
    for name, value in api.running(layer).items():
        np.testing.assert_allclose(value, c[f"running_{name}"].reshape(value.shape), atol=EXACT)
    np.testing.assert_allclose(api.evaluate(layer, c["x"]) * affine[0] + affine[1], c["y_eval"], atol=EXACT)


@pytest.mark.parametrize("number", range(18))
def test_group_whiten(library, number):
    c = case("group_whiten.npz", number)
    arguments = {"num_groups": int(c["num_groups"]), "iterations": int(c["iterations"]), "eps": 0.0}
    y, (dx, _, _) = library.vjp("group_whiten", c["dy"], x=c["x"], **arguments)
    np.testing.assert_allclose(y, c["y"], atol=EXACT)
    np.testing.assert_allclose(dx, c["dx"], atol=EXACT)

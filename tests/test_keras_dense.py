"""`polywhiten.keras.dense` makes of a fitted whitening layers of Keras with the same outputs."""

import os

import numpy as np
import pytest
from embedding_exports import assert_refuses_what_is_not_fitted, each_whitening, embeddings, fitted
from rows import Library

ROW = next(b for b in Library if b.value.keras_backend == os.environ.get("KERAS_BACKEND", "tensorflow"))
if ROW.value.missing:
    pytest.skip(ROW.value.missing, allow_module_level=True)

import keras  # noqa: E402

from polywhiten.keras import dense  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__:DeprecationWarning", "ignore:.*retracing")


def outputs(layer, x):
    return np.asarray(keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(x))), "float64")


@each_whitening
def test_outputs_are_those_of_the_estimator(arguments):
    x = embeddings()
    whitening = fitted(x, **arguments)
    np.testing.assert_allclose(outputs(dense(whitening), x), whitening.transform(x.astype("float64")), atol=5e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras multiplies float64 in float32 there")
def test_float64():
    x = embeddings().astype("float64")
    whitening = fitted(x, normalize=True)
    np.testing.assert_allclose(outputs(dense(whitening, "float64"), x), whitening.transform(x), atol=1e-11)


def test_the_layer_is_a_plain_frozen_dense_layer_that_loads_without_polywhiten(tmp_path):
    whitening = fitted(method="pca", n_components=5, normalize=True)
    layers = dense(whitening).layers
    assert [type(layer) for layer in layers] == [keras.layers.Dense, keras.layers.UnitNormalization]
    model = keras.Sequential([keras.Input((12,)), dense(whitening)])
    assert model.trainable_weights == []
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    x = embeddings()
    np.testing.assert_allclose(outputs(loaded, x), outputs(model, x), atol=1e-6)


def test_making_a_layer_draws_no_random_numbers():
    whitening = fitted()
    keras.utils.set_random_seed(0)
    expected = keras.ops.convert_to_numpy(keras.random.normal((3,)))
    keras.utils.set_random_seed(0)
    dense(whitening)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.random.normal((3,))), expected)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16", "float16"])
def test_lengths_are_computed_in_float32_under_policies_of_half_precision(policy):
    x = embeddings(deviations=0)
    layer = dense(fitted(x, normalize=True), policy)
    x[0] = 0
    layer.layers[0].bias.assign(np.zeros(12))
    y = outputs(layer, x)
    assert (y[0] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(y[1:], axis=1), 1, atol=1e-5)


def test_a_map_that_the_dtype_cannot_hold_is_refused():
    whitening = fitted(embeddings().astype("float64") * 1e-6)
    with pytest.raises(ValueError, match=r"can't be exported in float16, .* Choose another dtype"):
        dense(whitening, "float16")


def test_what_is_no_fitted_whitening_is_refused():
    assert_refuses_what_is_not_fitted(dense)

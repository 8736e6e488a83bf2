"""Tests of the callback that tracks Keras models, on the current backend."""

import os

import numpy as np
import pytest
from rows import Library

ROW = next(b for b in Library if b.value.keras_backend == os.environ.get("KERAS_BACKEND", "tensorflow"))
if ROW.value.missing:
    pytest.skip(ROW.value.missing, allow_module_level=True)

import keras  # noqa: E402
from keras import layers  # noqa: E402

from polywhiten.keras import GroupWhitening, IterNorm, WhiteningTracker  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__:DeprecationWarning")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 5, 5, 6)).astype("float32")
Y = RNG.normal(size=(12, 2)).astype("float32")


def compiled(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def functional():
    """Return a model with a nested model, a shared layer, and a layer that draws random numbers."""
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((5, 5, 6)), layers.Conv2D(8, 1), IterNorm(group_size=5, name="whiten")])
    shared = layers.BatchNormalization(name="shared")
    inputs = keras.Input((5, 5, 6))
    x = layers.Dropout(0.5)(shared(inner(inputs)))
    return compiled(keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(shared(x)))))


class Subclassed(keras.Model):
    """A model whose layers are within a custom layer, and whose call has no argument `training`."""

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = GroupWhitening(3)

        def call(self, x):
            return self.norm(x)

    def __init__(self):
        super().__init__()
        self.block, self.flat, self.top = self.Block(), layers.Flatten(), layers.Dense(2)

    def call(self, x):
        return self.top(self.flat(self.block(x)))


def small():
    keras.utils.set_random_seed(0)
    body = layers.Dense(4), GroupWhitening(2, name="groups"), layers.Flatten()
    return compiled(keras.Sequential([keras.Input((5, 5, 6)), *body, layers.Dense(2)]))


def fit(model, *callbacks, epochs=2):
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def covariance(rows):
    return np.cov(np.float64(rows).reshape(-1, rows.shape[-1]).T, bias=True)


def test_known_inputs_give_their_measures():
    model = compiled(keras.Sequential([keras.Input((6,)), IterNorm(method="eigh"), layers.Dense(2)]))
    x = (RNG.normal(size=(64, 6)) @ np.triu(np.ones((6, 6)))).astype("float32")
    tracker = WhiteningTracker(x)
    model.fit(x, np.zeros((64, 2)), verbose=0, callbacks=[tracker])
    row = tracker.rows[0]
    cov = covariance(x)
    deviation = np.sqrt(np.diag(cov))
    correlation = np.abs(cov / np.outer(deviation, deviation))[~np.eye(6, dtype=bool)].mean()
    assert (row.step, row.kind) == (0, "IterNorm")
    assert row.input_condition_number == pytest.approx(np.linalg.cond(cov), rel=1e-3)
    assert row.input_correlation == pytest.approx(correlation, rel=1e-3)
    # The model is in training mode, so the output is whitened by the batch's statistics.
    assert row.output_condition_number == pytest.approx(1, abs=1e-2)
    assert row.output_whitening_error == pytest.approx(0, abs=1e-2)


def test_every_kind_of_layer_is_measured_in_its_blocks():
    norms = IterNorm(group_size=4), layers.BatchNormalization(axis=1), GroupWhitening(-1), layers.GroupNormalization(2)
    inputs = keras.Input((5, 5, 6))
    outputs = layers.Dense(2)(layers.GlobalAveragePooling2D()(layers.Add()([norm(inputs) for norm in norms])))
    tracker = WhiteningTracker(X)
    fit(compiled(keras.Model(inputs, outputs)), tracker, epochs=1)
    expected = {
        "IterNorm": [covariance(X[..., :4]), covariance(X[..., 4:])],
        "BatchNormalization": [covariance(np.moveaxis(X, 1, -1))],
        "GroupWhitening": [covariance(sample) for sample in X],
        "GroupNormalization": [covariance(sample.reshape(25, 2, 3).swapaxes(1, 2)) for sample in X],
    }
    measured = {row.kind: row.input_condition_number for row in tracker.rows}
    assert measured == {
        kind: pytest.approx(np.median([np.linalg.cond(cov) for cov in blocks]), rel=1e-3)
        for kind, blocks in expected.items()
    }


def test_nested_and_shared_layers_have_rows():
    tracker = WhiteningTracker(X)
    model = fit(functional(), tracker)
    first = [(row.layer, row.kind) for row in tracker.rows if row.step == 0]
    paths = {layer.name: layer.path for layer in [*model.layers, model.layers[1].layers[-1]]}
    assert first == [
        (paths["whiten"], "IterNorm"),
        ("shared", "BatchNormalization"),
        ("shared (2)", "BatchNormalization"),
    ]
    assert all(np.isfinite(row.output_correlation) for row in tracker.rows)


def test_the_layers_of_a_subclassed_model_are_found():
    tracker = WhiteningTracker(X)
    model = fit(compiled(Subclassed()), tracker)
    assert [(row.step, row.layer) for row in tracker.rows] == [(n, model.block.norm.path) for n in (0, 3, 6)]
    samples = [covariance(sample.reshape(25, 3, 2).swapaxes(1, 2)) for sample in X]
    expected = np.median([np.linalg.cond(cov) for cov in samples])
    assert tracker.rows[0].input_condition_number == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("every", "steps"), [("epoch", [0, 3, 6, 9]), (2, [0, 2, 4, 6, 8]), (5, [0, 5])], ids=["epoch", "2", "5"]
)
def test_measured_every_so_often_also_in_a_second_fit(every, steps):
    tracker = WhiteningTracker(X, every=every)
    model = fit(small(), tracker)
    fit(model, tracker, epochs=1)
    assert [row.step for row in tracker.rows] == sorted({*steps, 6})  # step 6 is where the second fit begins


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras has none with PyTorch")
def test_several_batches_an_execution_are_counted():
    model = small()
    model.compile("sgd", "mse", steps_per_execution=2)
    tracker = WhiteningTracker(X, every=2)
    fit(model, tracker)
    assert [row.step for row in tracker.rows] == [0, 2, 5, 6]  # three batches per epoch


def test_weights_are_those_of_the_step():
    """This also holds on backends whose training keeps the weights outside the model during an epoch."""
    tracker = WhiteningTracker(X, every=1)
    fit(small(), tracker, epochs=1)
    assert len({row.input_condition_number for row in tracker.rows}) == 4


def test_layers_are_chosen_by_their_paths():
    norms = [layers.GroupNormalization(2, name=name) for name in "ab"]
    model = compiled(keras.Sequential([keras.Input((5, 5, 6)), *norms, layers.Flatten(), layers.Dense(2)]))
    tracker = WhiteningTracker(X, layers=[norms[1].path])
    fit(model, tracker, epochs=1)
    assert [(row.step, row.layer) for row in tracker.rows] == [(0, norms[1].path), (3, norms[1].path)]


def test_tracking_changes_nothing():
    """Weights, moving averages and random numbers are those without tracking, and the layers are unchanged."""
    tracker = WhiteningTracker(X, every=1)
    tracked = fit(functional(), tracker, epochs=1)
    plain = fit(functional(), epochs=1)
    assert tracker.rows
    for a, b in zip(tracked.variables, plain.variables, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b), err_msg=a.path)
    assert not any("call" in vars(layer) for layer in tracked._flatten_layers())


def test_layers_are_as_they_were_after_an_error():
    model = small()
    with pytest.raises(Exception, match=r"\S"):
        fit(model, WhiteningTracker(X[..., :3]))
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_masked_positions_are_left_out():
    x = RNG.normal(size=(12, 7, 5)).astype("float32")
    x[:, 4:] = 0
    model = compiled(
        keras.Sequential(
            [keras.Input((7, 5)), layers.Masking(), IterNorm(), layers.GlobalAveragePooling1D(), layers.Dense(2)]
        )
    )
    tracker = WhiteningTracker(x)
    model.fit(x, Y, verbose=0, callbacks=[tracker])
    assert tracker.rows[0].input_condition_number == pytest.approx(np.linalg.cond(covariance(x[:, :4])), rel=1e-3)
    assert tracker.rows[0].output_condition_number < 1.5


def test_several_inputs_and_half_precision():
    inputs = {name: keras.Input((6,), name=name) for name in "ab"}
    x = layers.BatchNormalization(dtype="mixed_bfloat16")(layers.Add()(list(inputs.values())))
    model = compiled(keras.Model(inputs, layers.Dense(2)(x)))
    data = {name: RNG.normal(size=(64, 6)).astype("float32") for name in "ab"}
    tracker = WhiteningTracker(data)
    model.fit(data, np.zeros((64, 2)), verbose=0, callbacks=[tracker])
    expected = np.linalg.cond(covariance(data["a"] + data["b"]))
    assert tracker.rows[0].input_condition_number == pytest.approx(expected, rel=0.05)


def test_wrong_use():
    with pytest.raises(ValueError, match="every=0 must be 1 or more"):
        WhiteningTracker(X, every=0)
    with pytest.raises(TypeError, match="every='batch' must be an integer"):
        WhiteningTracker(X, every="batch")
    with pytest.raises(ValueError, match="model has no layer to track"):
        fit(
            compiled(keras.Sequential([keras.Input((5, 5, 6)), layers.Flatten(), layers.Dense(2)])), WhiteningTracker(X)
        )
    with pytest.raises(ValueError, match=r"layers has 'dense', which can't be tracked: use names of '.*groups'"):
        fit(small(), WhiteningTracker(X, layers=["dense"]))

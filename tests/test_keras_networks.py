"""`convert` and `fold` change whole Keras models, on the current backend, and keep what these compute."""

import os
import warnings

import numpy as np
import pytest
from rows import Library

ROW = next(b for b in Library if b.value.keras_backend == os.environ.get("KERAS_BACKEND", "tensorflow"))
if ROW.value.missing:
    pytest.skip(ROW.value.missing, allow_module_level=True)

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402

from polywhiten.analysis import InfeasibleWarning  # noqa: E402
from polywhiten.keras import GroupWhitening, IterNorm, convert, fold  # noqa: E402

BACKEND = keras.backend.backend()
Conv, BatchNorm, GroupNorm = layers.Conv2D, layers.BatchNormalization, layers.GroupNormalization

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__:DeprecationWarning", "ignore:.*retracing")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def trained(model, seed=0):
    """Return the model with other parameters and averages than it begins with."""
    random = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        for weight in layer._trainable_variables + layer._non_trainable_variables:
            values = random.normal(size=weight.shape)
            if weight.name in ("gamma", "moving_variance"):
                values = 0.5 + values**2
            elif weight.name == "moving_whitener":
                values = values @ values.swapaxes(1, 2) + np.eye(values.shape[1])
            elif "seed" in weight.name:
                continue
            weight.assign(values)
    return model


def sequential(shape, *body):
    return trained(keras.Sequential([keras.Input(shape), *body]))


def outputs(model, x):
    """Return outputs in inference as `predict` computes them, but without compiling the model."""
    return np.asarray(ops.convert_to_numpy(model(ops.convert_to_tensor(x), training=False)), "float64")


def assert_same_outputs(model, new, x, tolerance=1e-5):
    expected = outputs(model, x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs(new, x) / scale, expected / scale, rtol=0, atol=tolerance)


def backbone():
    """Return a model with one of each way in which a layer may stand in a model, and a batch of its inputs."""
    inner = keras.Sequential(
        [keras.Input((6, 6, 4)), Conv(6, 3), BatchNorm(name="bn"), layers.Dropout(0.5)], name="inner"
    )
    inner.trainable = False
    inputs, shared = keras.Input((8, 8, 3), name="images"), BatchNorm(name="shared", axis=-1, momentum=0.5)
    x = BatchNorm(name="first", epsilon=1e-2, trainable=False)(Conv(4, 3)(inputs), training=False)
    x = ops.relu(shared(x)) * 2 + shared(x)
    x = layers.Lambda(lambda t: t + 1)(inner(x))
    x = layers.TimeDistributed(BatchNorm(name="part"), name="frames")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)), name="backbone")
    return trained(model), normal(5, 8, 8, 3)


# ---------------------------------------------------------------- convert

BATCH_NORMS = {
    "rows": ((6,), {}),
    "images": ((5, 4, 6), {"epsilon": 1e-2, "momentum": 0.5}),
    "channels first": ((6, 5, 4), {"axis": 1}),
    "no affine map": ((5, 6), {"center": False, "scale": False}),
    "half precision": ((5, 6), {"dtype": "mixed_float16"}),
}


@pytest.mark.parametrize(("shape", "arguments"), BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_batch_norm_to_iter_norm_and_back(shape, arguments):
    model = sequential(shape, layers.ReLU(), BatchNorm(**arguments), layers.ReLU())
    x, old = normal(8, *shape), model.layers[1]
    converted = convert(model, "iter_norm", group_size=4)
    new = converted.layers[1]
    assert type(new) is IterNorm
    assert new.group_size == 4
    for name in ("name", "axis", "epsilon", "momentum", "center", "scale", "dtype_policy"):
        assert getattr(new, name) == getattr(old, name)
    tolerance = 2e-3 if "dtype" in arguments else 1e-5
    assert_same_outputs(model, converted, x, tolerance)
    back = convert(converted, "batch_norm")
    assert type(back.layers[1]) is BatchNorm
    assert back.layers[1].get_config() == old.get_config()
    for weight, expected in zip(back.layers[1].get_weights(), old.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)


def test_a_tracked_covariance_is_that_of_batch_norm():
    model = sequential((6,), BatchNorm())
    model.layers[0].moving_variance.assign([1e-3, 1, 2, 3, 4, 5])
    exact, report = convert(model, "iter_norm", track="covariance", method="eigh", return_report=True)
    assert_same_outputs(model, exact, normal(5, 6))
    assert report[0].note == ""
    _, report = convert(model, "iter_norm", track="covariance", return_report=True)
    assert "outputs in inference change" in report[0].note, "five of Newton's steps don't invert this covariance"


def test_models_of_every_kind_keep_names_flags_and_outputs():
    model, x = backbone()
    converted, report = convert(model, "iter_norm", group_size=4, return_report=True)
    assert [change.name for change in report.replaced] == ["first", "shared", "inner/bn"]
    (left,) = report.left
    assert (left.name, left.note) == ("frames/part", "is a part of the layer frames, which Keras copies as a whole")
    assert [layer.name for layer in converted.layers] == [layer.name for layer in model.layers]
    assert [layer.trainable for layer in converted.layers] == [layer.trainable for layer in model.layers]
    assert not converted.get_layer("inner").get_layer("bn").trainable
    assert (converted.name, converted.input_shape) == (model.name, model.input_shape)
    assert isinstance(converted.get_layer("inner"), keras.Sequential)
    assert_same_outputs(model, converted, x)


def test_models_share_no_arrays():
    """With JAX, `predict` deletes the arrays that it has used up, which the other model would miss."""
    model = sequential((6,), layers.Dense(6), BatchNorm())
    converted, x = convert(model, "iter_norm"), normal(4, 6)
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(converted.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def test_a_converted_model_trains_and_is_saved(tmp_path):
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, layers.Flatten()(BatchNorm()(Conv(8, 3)(inputs))))
    model.compile(keras.optimizers.SGD(0.25), "mse")
    converted = convert(trained(model), "iter_norm", group_size=4, momentum=0.5)
    assert converted.compiled
    assert float(converted.optimizer.learning_rate) == 0.25
    x = normal(40, 6, 6, 3)
    converted.fit(x, np.zeros((40, 128)), verbose=0)
    whitener = np.asarray(converted.layers[2].moving_whitener)
    assert np.abs(whitener[:, 0, 1]).min() > 0, "training finds correlations"
    converted.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(outputs(again, x), outputs(converted, x), rtol=1e-5, atol=1e-6)


def test_what_keras_cannot_compile_again_is_a_warning():
    model = sequential((6,), BatchNorm())

    def difference(a, b):
        return ops.mean(abs(a - b))

    model.compile("sgd", difference)
    with pytest.warns(UserWarning, match="isn't compiled, because Keras can't copy what .* call its `compile`"):
        new = convert(model, "iter_norm")
    assert not new.compiled
    assert model.compiled


def test_layers_keep_state_that_is_no_weight():
    """A normalization of inputs computes with values that it derives from its weights."""
    scaling = layers.Normalization()
    scaling.adapt(normal(50, 3) * 4 + 2)
    model = keras.Sequential([keras.Input((3,)), scaling, layers.Dense(4), BatchNorm()])
    assert_same_outputs(model, convert(model, "iter_norm"), normal(5, 3))


def test_masks_reach_the_layers_behind():
    model = sequential((7, 3), layers.Masking(), BatchNorm(), layers.LSTM(4))
    x = normal(4, 7, 3)
    x[:, 5:] = 0
    converted = convert(model, "iter_norm", group_size=2)
    assert_same_outputs(model, converted, x)
    trained(converted)
    assert_same_outputs(converted, fold(converted), x)


def test_losses_of_activities_stay_and_wrong_arguments_are_named():
    model = keras.Sequential([keras.Input((8,)), BatchNorm(activity_regularizer="l2", gamma_regularizer="l2")])
    new, x = convert(model, "iter_norm"), normal(4, 8)
    for each in (model, new):
        each(x)
    assert len(new.losses) == len(model.losses) == 2
    with pytest.raises(ValueError, match=r"^method='zca' is unknown"):
        convert(model, "iter_norm", method="zca")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends convolve in every layout")
def test_what_tensorflow_cannot_convolve_on_a_cpu_is_left():
    model = sequential((6, 9), IterNorm(axis=1), layers.GlobalAveragePooling1D())
    with pytest.warns(UserWarning, match="no layer of .* is folded"):
        folded = fold(model)
    assert_same_outputs(model, folded, normal(4, 6, 9))


@pytest.mark.filterwarnings("ignore::polywhiten.analysis.InfeasibleWarning")
def test_normalization_within_samples():
    model = sequential((4, 6), GroupNorm(3, epsilon=1e-2), layers.ReLU(), BatchNorm())
    new, report = convert(model, "group_whitening", method="eigh", return_report=True)
    first, _, second = new.layers
    assert isinstance(first, GroupWhitening)
    assert (first.groups, first.epsilon, first.method, second.groups) == (3, 1e-2, "eigh", 3)
    np.testing.assert_array_equal(first.gamma, model.layers[0].gamma)
    assert [change.note for change in report] == ["outputs change", "groups=3 instead of 32; outputs change"]
    back, report = convert(new, "group_norm", return_report=True)
    assert back.layers[0].get_config() == model.layers[0].get_config()
    _, report = convert(model, "batch_norm", return_report=True)
    assert [change.note for change in report] == ["has no statistics yet", "is of this kind already"]
    np.testing.assert_array_equal(convert(model, "iter_norm").layers[0].moving_mean, np.zeros(6))


def test_a_fixed_argument_training_is_left_out_where_a_layer_has_none():
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, BatchNorm()(inputs, training=True))
    assert outputs(convert(model, "group_whitening", groups=2), normal(4, 5, 6)).shape == (4, 5, 6)
    _, report = convert(model, "iter_norm", return_report=True)
    assert report[0].note == "is called with training=True: outputs in inference change"


def test_batch_norm_gets_the_variances_of_iter_norm():
    model = keras.Sequential([keras.Input((6,)), IterNorm(group_size=4, momentum=0.0, method="eigh")])
    x = normal(100, 6) @ normal(6, 6, seed=1)
    model.layers[0](x, training=True)
    new, report = convert(model, "batch_norm", return_report=True)
    np.testing.assert_allclose(new.layers[0].moving_variance, x.var(axis=0), rtol=1e-3)
    assert report[0].note == "has the variances alone, without correlations: outputs in inference change"


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends have no replicas")
def test_synchronized_statistics_stay_synchronized():
    model = sequential((6,), BatchNorm(synchronized=True))
    new, report = convert(model, "iter_norm", return_report=True)
    assert new.layers[0].synchronized
    assert report[0].note == "has synchronized=True"


def test_batch_renormalization_is_left():
    if "renorm" not in BatchNorm().get_config():
        pytest.skip("this version of Keras has none")
    model = sequential((6,), BatchNorm(renorm=True))
    with pytest.warns(UserWarning, match="no layer of .* is replaced. Its normalization layers: 1 BatchNormalization"):
        _, report = convert(model, "iter_norm", return_report=True)
    assert report[0].note == "has renorm=True, which other layers don't have"


def test_layers_are_chosen_by_name_place_and_predicate():
    model, _ = backbone()

    def replaced(where):
        return [change.name for change in convert(model, "iter_norm", where=where, return_report=True)[1].replaced]

    assert replaced("first") == ["first"]
    assert replaced("all") == ["first", "shared", "inner/bn"]
    assert replaced(["inner/*", "sh?red"]) == ["shared", "inner/bn"]
    assert replaced(lambda name, layer: layer.momentum == 0.5) == ["shared"]
    with pytest.raises(ValueError, match=r"where='middle' needs blocks .* use a pattern of names, such as .*_2_bn"):
        convert(model, "iter_norm", where="middle")
    with pytest.raises(ValueError, match=r"where='bn\*' matches none of the network's 4 normalization layers"):
        convert(model, "iter_norm", where="bn*")


def test_infeasible_groups_are_reduced_or_an_error():
    model = sequential((3, 3, 40), BatchNorm(name="a"), layers.MaxPooling2D(3), BatchNorm(name="b"))
    with pytest.warns(InfeasibleWarning, match="1 layers can't have the groups .* b: group_size=13") as caught:
        new = convert(model, "iter_norm", batch_size=8)
    (warning,) = (each for each in caught if each.category is InfeasibleWarning)
    assert warning.message.layers == {"b": "group_size=13 instead of 64"}
    assert warning.filename == __file__
    assert [layer.group_size for layer in new.layers[::2]] == [64, 13]
    with pytest.raises(ValueError, match=r"that are wanted\. With strict=False: b: group_size=13"):
        convert(model, "iter_norm", batch_size=8, strict=True)
    with pytest.warns(InfeasibleWarning, match="a: groups=20 instead of 16.*; b: groups=5 instead of 16"):
        convert(model, "group_whitening", groups=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfeasibleWarning)
        convert(model, "iter_norm")


class Subclassed(keras.Model):
    """A model whose calls Keras doesn't know."""

    def call(self, inputs):
        return inputs


WRONG = {
    "no model": (lambda: convert(BatchNorm(), "iter_norm"), TypeError, "a keras.Model is needed"),
    "subclassed": (lambda: convert(Subclassed(), "iter_norm"), ValueError, "subclassed model Subclassed"),
    "subclassed, fold": (lambda: fold(Subclassed()), ValueError, "subclassed model Subclassed"),
    "not built": (lambda: fold(keras.Sequential([BatchNorm()])), ValueError, "isn't built: call it on a batch"),
    "to": (lambda: convert(sequential((4,), BatchNorm()), "layer_norm"), ValueError, "to='layer_norm'"),
    "argument": (
        lambda: convert(sequential((4,), BatchNorm()), "iter_norm", groups=2),
        TypeError,
        "groups=2 is no argument for to='iter_norm', which accepts momentum, epsilon",
    ),
    "group_size": (
        lambda: convert(sequential((4,), BatchNorm()), "iter_norm", group_size=0),
        ValueError,
        "group_size=0",
    ),
    "batch_size": (
        lambda: convert(sequential((4,), BatchNorm()), "iter_norm", batch_size=0),
        ValueError,
        "batch_size=0",
    ),
}


@pytest.mark.parametrize(("use", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(use, error, message):
    with pytest.raises(error, match=message):
        use()


# ---------------------------------------------------------------- fold

OWN = "Conv2D(8, 1 x 1, groups=2)"
FIRST = {"data_format": "channels_first"}


def white(group_size, axis=-1):
    return IterNorm(axis, group_size=group_size)


FOLDED = {
    "before": ((8, 8, 3), [Conv(8, 3, padding="same", use_bias=False), white(4)], ["before"]),
    "before, twice": ((8, 8, 3), [Conv(8, 3), white(3), BatchNorm()], ["before", "before"]),
    "before, in its groups": ((8, 8, 8), [Conv(8, 3, groups=2), white(4)], ["before"]),
    "before, across its groups": ((8, 8, 8), [Conv(8, 3, groups=4), white(4)], [OWN]),
    "depthwise": ((8, 8, 2), [layers.DepthwiseConv2D(3, depth_multiplier=4), white(2)], ["before"]),
    "depthwise, mixed": ((8, 8, 8), [layers.DepthwiseConv2D(3), white(4)], [OWN]),
    "separable": ((8, 8, 8), [BatchNorm(), layers.SeparableConv2D(6, 3), white(4)], ["after", "before"]),
    "transposed": ((8, 8, 8), [layers.Conv2DTranspose(6, 3, strides=2, padding="same"), white(4)], ["before"]),
    "after": ((8, 8, 8), [white(4), Conv(6, 3, strides=2, activation="relu")], ["after"]),
    "after, padded": ((8, 8, 8), [white(4), Conv(6, 3, padding="same")], [OWN]),
    "after, 1 x 1": ((8, 8, 8), [white(4), Conv(6, 1, padding="same", groups=2)], ["after"]),
    "after, transposed": ((8, 8, 8), [white(4), layers.Conv2DTranspose(6, 3)], [OWN]),
    "behind an activation": ((8, 8, 3), [Conv(8, 3, activation="relu"), white(4), BatchNorm()], [OWN, None]),
    "rows": (
        (8,),
        [layers.Dense(6, use_bias=False), white(4), layers.ReLU(), white(4), layers.Dense(4)],
        ["before", "after"],
    ),
    "alone": ((8,), [layers.ReLU(), white(4), layers.ReLU()], ["Dense(8)"]),
    "sequences": (
        (7, 8),
        [layers.Conv1D(6, 3, padding="causal"), white(4), layers.ReLU(), BatchNorm()],
        ["before", None],
    ),
    "volumes": ((6, 6, 6, 3), [layers.Conv3D(6, 3), white(4)], ["before"]),
    "channels first": (
        (3, 8, 8),
        [Conv(8, 3, **FIRST), white(4, 1), layers.ReLU(), white(4, 1), Conv(5, 3, **FIRST)],
        ["before", "after"],
    ),
    "channels first, alone": ((8, 6, 6), [layers.ReLU(), white(4, 1), layers.ReLU()], [OWN]),
    "another axis": ((8, 5), [BatchNorm(axis=1), layers.Dense(4)], [None]),
}


def folded_into(change):
    """Return what became of a layer: the side on which another one computes it, a new layer, or None."""
    return change.after.split()[-2] if change.after.startswith("a part of") else change.after or None


@pytest.mark.parametrize(("shape", "body", "expected"), FOLDED.values(), ids=FOLDED)
@pytest.mark.filterwarnings("ignore:no layer of")
def test_fold(shape, body, expected):
    model = sequential(shape, *(type(layer).from_config(layer.get_config()) for layer in body))
    folded, report = fold(model, return_report=True)
    assert [folded_into(change) for change in report] == expected
    assert sum(isinstance(layer, IterNorm) for layer in folded.layers) == 0
    assert len(folded.layers) == len(model.layers) - sum(each in ("before", "after") for each in expected)
    assert_same_outputs(model, folded, normal(5, *shape))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only there Keras confuses the axes")
def test_no_bias_is_added_where_keras_adds_it_along_the_width():
    body = Conv(8, 1, use_bias=False, **FIRST), white(4, 1), layers.ReLU(), white(4, 1)
    model = sequential((3, 8, 8), *body)
    with pytest.warns(UserWarning, match="no layer of"):
        folded, report = fold(model, return_report=True)
    assert "along the width" in report[0].note
    assert_same_outputs(model, folded, normal(5, 3, 8, 8))


def test_fold_keeps_what_others_use():
    inputs = keras.Input((6, 6, 3))
    x, two_users = Conv(4, 3, name="conv")(inputs), IterNorm(group_size=2, name="two_users")
    x = layers.add([x, two_users(x)])
    twice, dense = BatchNorm(name="twice"), layers.Dense(4, name="dense")
    x = layers.add([twice(dense(x)), twice(dense(x))])
    returned = layers.Dense(4)(x)
    y = BatchNorm(name="of_returned")(returned)
    by_batch = BatchNorm(name="by_batch")(layers.Dense(4)(x), training=True)
    model = trained(keras.Model(inputs, {"returned": returned, "y": y, "by_batch": by_batch}))
    folded, report = fold(model, return_report=True)
    assert {change.name: change.note for change in report} == {
        "two_users": "no convolution or dense layer is next to it alone",
        "twice": "is called several times",
        "of_returned": "no convolution or dense layer is next to it alone",
        "by_batch": "is called with training=True",
    }
    assert [change.name for change in report.replaced] == ["two_users"]
    x = ops.convert_to_tensor(normal(5, 6, 6, 3))
    (expected, y) = ({k: ops.convert_to_numpy(v) for k, v in each(x).items()} for each in (model, folded))
    for name, values in expected.items():
        np.testing.assert_allclose(y[name], values, rtol=0, atol=1e-5 * np.abs(values).max())


def test_fold_of_nested_models_and_diagonal_whiteners():
    """What batch normalization was converted to is batch normalization again where no neighbour takes it in."""
    model, x = backbone()
    converted = convert(model, "iter_norm")
    folded, report = fold(converted, return_report=True)
    assert {change.name: folded_into(change) for change in report[:3]} == {
        "first": "before",
        "shared": None,
        "inner/bn": "before",
    }
    assert_same_outputs(model, folded, x)
    body = sequential((5, 6), layers.ReLU(), BatchNorm(), layers.ReLU())
    folded = fold(convert(body, "iter_norm", group_size=2))
    assert isinstance(folded.layers[1], BatchNorm)
    assert_same_outputs(body, folded, normal(4, 5, 6))


# ---------------------------------------------------------------- networks of keras.applications


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="one backend is enough, and builds it fastest")
def test_resnet_50():
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=5, classifier_activation=None)
    converted, report = convert(model, "iter_norm", where="*_2_bn", group_size=16, return_report=True)
    blocks = {2: 3, 3: 4, 4: 6, 5: 3}
    names = [f"conv{stage}_block{block}_2_bn" for stage, count in blocks.items() for block in range(1, count + 1)]
    assert [change.name for change in report] == names
    folded, report = fold(converted, return_report=True)
    assert [folded_into(change) for change in report] == ["before"] * 53
    x = normal(2, 32, 32, 3)
    assert_same_outputs(model, folded, x, 3e-5)


def test_layer_norm_has_no_counterpart():
    model = sequential((5, 4, 6), Conv(6, 3, padding="same"), layers.LayerNormalization(), layers.LayerNormalization())
    with pytest.warns(UserWarning, match="is replaced. Its normalization layers: 2 LayerNormalization"):
        new, report = convert(model, "iter_norm", return_report=True)
    assert report == ()
    assert new is not model
    assert_same_outputs(model, new, normal(3, 5, 4, 6))


# ---------------------------------------------------------------- export


@pytest.mark.filterwarnings("ignore")  # exporters warn about tracing
def test_converted_and_folded_models_are_exported(tmp_path):
    inputs = keras.Input((None, None, 3))
    x = layers.ReLU()(BatchNorm()(Conv(8, 3, padding="same")(inputs)))
    x = layers.GlobalAveragePooling2D()(BatchNorm()(Conv(8, 3, padding="same", groups=4)(x)))
    converted = trained(convert(keras.Model(inputs, x), "iter_norm", group_size=4))
    images = normal(5, 9, 7, 3)
    for name, model in (("converted", converted), ("folded", fold(converted))):
        expected = outputs(model, images)
        file = tmp_path / name
        if BACKEND == "torch":  # from which Keras exports no SavedModel
            pytest.importorskip("onnx")
            onnxruntime = pytest.importorskip("onnxruntime")
            model.export(file, format="onnx", verbose=False)
            session = onnxruntime.InferenceSession(file)
            (result,) = session.run(None, {session.get_inputs()[0].name: images})
        else:
            tensorflow = pytest.importorskip("tensorflow")
            model.export(file, verbose=False)
            loaded = tensorflow.saved_model.load(file)
            result = loaded.serve(images).numpy()
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

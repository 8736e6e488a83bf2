"""The layers work wherever Keras' normalization layers do, on the current backend."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from rows import Library

ROW = next(b for b in Library if b.value.keras_backend == os.environ.get("KERAS_BACKEND", "tensorflow"))
if ROW.value.missing:
    pytest.skip(ROW.value.missing, allow_module_level=True)

import keras  # noqa: E402
from keras.src.testing import TestCase  # noqa: E402

import polywhiten as pw  # noqa: E402
from polywhiten.keras import GroupWhitening, IterNorm  # noqa: E402

BACKEND = keras.backend.backend()
api = ROW.value.layers

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__:DeprecationWarning", "ignore:.*shuffle=True:UserWarning")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def network(*layers, shape=(6, 6, 3)):
    keras.utils.set_random_seed(0)
    body = [keras.layers.Conv2D(10, 3, padding="same", use_bias=False), *layers, keras.layers.ReLU()]
    model = keras.Sequential([keras.Input(shape), *body, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def in_new_process(code, *args, **environment):
    command = [sys.executable, "-P", "-c", code, *map(str, args)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------- Keras' test harness

HARNESS = {
    "rows": (IterNorm, {}, (8, 6)),
    "no affine, exact": (IterNorm, {"center": False, "scale": False, "method": "eigh"}, (8, 6)),
    "sequences, channels first": (IterNorm, {"axis": 1, "track": "covariance"}, (4, 6, 5)),
    "pictures, a smaller last group": (IterNorm, {"group_size": 4, "momentum": 0.5, "iterations": 3}, (4, 5, 5, 6)),
    "volumes": (IterNorm, {"group_size": 3, "method": "minimax"}, (4, 3, 3, 3, 6)),
    "regularized": (
        IterNorm,
        {"gamma_regularizer": "l2", "beta_regularizer": "l2", "gamma_constraint": "non_neg", "epsilon": 1e-3},
        (8, 6),
    ),
    "initial averages": (
        IterNorm,
        {
            "moving_mean_initializer": "ones",
            "moving_variance_initializer": {"class_name": "Constant", "config": {"value": 4.0}},
        },
        (8, 6),
    ),
    "groups of rows": (GroupWhitening, {"groups": 2}, (8, 6)),
    "groups of sequences, channels first": (GroupWhitening, {"groups": 3, "axis": 1, "scale": False}, (4, 6, 5)),
    "as many groups as channels": (GroupWhitening, {"groups": -1, "method": "eigh"}, (4, 5, 5, 6)),
    "groups of volumes": (GroupWhitening, {"groups": 3, "gamma_regularizer": "l2"}, (4, 3, 3, 3, 6)),
}


@pytest.mark.parametrize(("layer", "arguments", "shape"), HARNESS.values(), ids=HARNESS)
def test_keras_own_layer_test(layer, arguments, shape):
    affine = arguments.get("scale", True) + arguments.get("center", True)
    modes = [{"training": True}, {"training": False}] if shape == (4, 6, 5) else [{"training": True}]
    for call in modes if layer is IterNorm else [{}]:
        TestCase().run_layer_test(
            layer,
            init_kwargs=arguments,
            call_kwargs=call,
            input_shape=shape,
            expected_output_shape=shape,
            expected_num_trainable_weights=affine,
            expected_num_non_trainable_weights=2 if layer is IterNorm else 0,
            expected_num_losses=sum(name.endswith("regularizer") for name in arguments),
            supports_masking=True,
        )


# ---------------------------------------------------------------- arguments


def test_arguments_in_the_order_of_keras_own_layers():
    ours, theirs = IterNorm(1, 0.5, 1e-3, False, False), keras.layers.BatchNormalization(1, 0.5, 1e-3, False, False)
    for name in ("axis", "momentum", "epsilon", "center", "scale"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours = GroupWhitening(4, 1, 1e-3, False, False)
    theirs = keras.layers.GroupNormalization(4, 1, 1e-3, False, False)
    for name in ("groups", "axis", "epsilon", "center", "scale"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (IterNorm().momentum, GroupWhitening().groups) == (0.99, 32)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(IterNorm, keras.layers.BatchNormalization), (GroupWhitening, keras.layers.GroupNormalization)],
    ids=["BatchNormalization", "GroupNormalization"],
)
def test_every_argument_of_keras_own_layer_is_taken_in_its_order(ours, theirs):
    names, wanted = (list(inspect.signature(each).parameters) for each in (ours, theirs))
    positional = wanted[: wanted.index("gamma_constraint") + 1]
    assert names[: len(positional)] == positional
    assert set(wanted) - set(names) <= {"renorm", "renorm_clipping", "renorm_momentum"}


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (IterNorm, keras.layers.BatchNormalization, {"momentum": 0.5, "moving_variance_initializer": "zeros"}),
        (IterNorm, keras.layers.BatchNormalization, {"dtype": "mixed_float16", "gamma_regularizer": "l2"}),
        (GroupWhitening, keras.layers.GroupNormalization, {"groups": 2, "beta_initializer": "ones"}),
    ],
)
def test_layers_of_the_configuration_of_keras_own(ours, theirs, arguments):
    norm = theirs(axis=1, epsilon=0.1, center=False, trainable=False, name="norm", **arguments)
    config = norm.get_config()
    layer = ours.from_config(config)
    mine, again = layer.get_config(), ours.from_config(layer.get_config()).get_config()
    assert mine == again
    assert {name: mine[name] for name in config if not name.startswith("renorm")} == {
        name: value for name, value in config.items() if not name.startswith("renorm")
    }
    assert layer(normal(8, 6)).shape == (8, 6)


def test_a_configuration_with_renorm_is_an_error():
    config = IterNorm().get_config() | {"renorm": True, "renorm_clipping": {}, "renorm_momentum": 0.99}
    with pytest.raises(ValueError, match="renorm=True: IterNorm has no batch renormalization"):
        IterNorm.from_config(config)


@pytest.mark.parametrize("track", ["whitener", "covariance"])
@pytest.mark.parametrize(
    "variance",
    ["ones", "zeros", keras.initializers.Constant(4.0), lambda shape, dtype: 1 + keras.ops.arange(*shape, dtype=dtype)],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_untrained_layer_infers_as_batch_normalization_does(track, variance, dtype):
    initial = {"moving_mean_initializer": "ones", "moving_variance_initializer": variance, "epsilon": 1e-7}
    layer = IterNorm(group_size=4, track=track, method="eigh", dtype=dtype, **initial)
    norm, x = keras.layers.BatchNormalization(dtype=dtype, **initial), normal(8, 6).astype(dtype)
    tolerance = {"float32": 1e-5, "float16": 2e-3}[dtype]
    y, expected = (api.evaluate(each, x) for each in (layer, norm))
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    if track == "whitener":
        np.testing.assert_array_equal(api.running(layer)["whitener"][1, 2:], [[0, 0, 1, 0], [0, 0, 0, 1]])


WRONG = {
    "momentum": (lambda: IterNorm(momentum=2), "momentum=2.0 must be from 0 to 1"),
    "epsilon": (lambda: IterNorm(epsilon=-1), "epsilon=-1.0 must be 0 or more"),
    "axis": (lambda: IterNorm(axis=3)(normal(4, 6)), r"axis=3 holds no channels in shape \(4, 6\)"),
    "track": (lambda: IterNorm(track="variance"), "track='variance' is unknown: use one of 'whitener'"),
    "method": (lambda: GroupWhitening(method="zca"), "method='zca' is unknown"),
    "groups": (lambda: GroupWhitening(4)(normal(4, 6)), "groups=4 doesn't divide 6 channels: use one of 1, 2, 3, 6"),
    "no groups": (lambda: GroupWhitening(0), "groups=0 must be 1 or more"),
    "unknown channels": (lambda: IterNorm().build((None, None)), r"\(None, None\): the channels, at axis=-1, have to"),
    "rank": (lambda: IterNorm()(normal(4)), "at least 2 dimensions"),
    "one value": (lambda: GroupWhitening(6)(normal(4, 6)), r"\(4, 6\) gives 1 values a group: .* fewer than 6 groups"),
    "mask": (
        lambda: IterNorm()(normal(4, 5, 6), mask=np.ones((4, 6), bool)),
        r"mask has shape \(4, 6\): .* \(4, 5\)",
    ),
}


@pytest.mark.parametrize(("use", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(use, message):
    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it has them")
def test_replicas_are_tensorflows():
    with pytest.raises(ValueError, match=f"synchronized=True needs Keras' TensorFlow backend, not {BACKEND}"):
        IterNorm(synchronized=True)


# ---------------------------------------------------------------- masks and freezing


@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
@pytest.mark.parametrize("options", [{}, {"track": "covariance", "method": "eigh"}], ids=["newton", "eigh"])
def test_masked_positions_leave_no_trace_in_the_statistics(axis, options):
    """Output, averages and gradients are those of a step on the unmasked positions alone."""
    x, dy, mask = np.float64(normal(6, 7, 5)), np.float64(normal(6, 7, 5, seed=1)), normal(6, 7, seed=2) > -0.5
    x[~mask] += 100
    dy[~mask] = 0
    arguments = {"group_size": 3, "momentum": 0.5, "dtype": "float64", **options}
    masked, plain = IterNorm(axis=axis, **arguments), IterNorm(**arguments)
    moved = np.moveaxis(x, -1, axis)
    y, (dx, *affine) = api.gradients(masked, moved, np.moveaxis(dy, -1, axis), mask=mask)
    expected, (expected_dx, *expected_affine) = api.gradients(plain, x[mask], dy[mask])
    np.testing.assert_allclose(np.moveaxis(y, axis, -1)[mask], expected, atol=1e-9)
    np.testing.assert_allclose(np.moveaxis(dx, axis, -1)[mask], expected_dx, atol=1e-8)
    np.testing.assert_allclose(np.moveaxis(dx, axis, -1)[~mask], 0)
    for a, b in zip(affine, expected_affine, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)
    if BACKEND != "jax":  # there the gradients come from a stateless call, which updates no averages
        for name, value in api.running(masked).items():
            np.testing.assert_allclose(value, api.running(plain)[name], atol=1e-10)


def test_a_batch_that_is_masked_as_a_whole_is_not_averaged():
    layer = IterNorm(group_size=3)
    layer.build((4, 5, 6))
    before = api.running(layer)
    y = layer(normal(4, 5, 6), training=True, mask=np.zeros((4, 5), bool))
    assert np.all(np.isfinite(keras.ops.convert_to_numpy(y)))
    for name, value in api.running(layer).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("shape", [(0, 4, 6), (5, 0, 6)], ids=str)
@pytest.mark.parametrize("make", [IterNorm, lambda **k: GroupWhitening(3, **k)], ids=["IterNorm", "GroupWhitening"])
def test_what_has_no_samples_passes_with_gradients_of_zero_and_changes_no_average(make, shape):
    layer, untrained = make(dtype="float64", epsilon=0), make(dtype="float64", epsilon=0)
    untrained.build(shape)
    y, (dx, *affine) = api.gradients(layer, np.zeros(shape), np.zeros(shape))
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(affine, np.zeros((2, 6)))
    for name, value in api.running(layer).items():
        np.testing.assert_array_equal(value, api.running(untrained)[name])


def test_a_mask_comes_from_the_layer_before():
    x = normal(4, 7, 5)
    x[:, 5:] = 0
    layer = IterNorm(momentum=0.0)
    keras.Sequential([keras.layers.Masking(), layer])(x, training=True)
    np.testing.assert_allclose(api.running(layer)["mean"], x[:, :5].mean(axis=(0, 1)), atol=1e-5)


def test_frozen_layers_whiten_by_their_averages():
    layer, x = IterNorm(group_size=4), normal(16, 6)
    layer(x, training=True)
    before, expected = api.running(layer), api.evaluate(layer, x)
    layer.trainable = False
    # With PyTorch, other kernels are used when operations are recorded.
    rounding = 1e-6 if keras.backend.backend() == "torch" else 0
    np.testing.assert_allclose(api.train(layer, x), expected, rtol=rounding, atol=rounding)
    for name, value in api.running(layer).items():
        np.testing.assert_array_equal(value, before[name])
    assert not layer.trainable_weights


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's tensors alone change in place")
@pytest.mark.parametrize("track", ["whitener", "covariance"])
def test_gradient_in_inference_is_that_of_its_own_averages(track):
    import torch

    layer, x = IterNorm(group_size=4, track=track, momentum=0.5), torch.randn(16, 6, requires_grad=True)
    layer(x, training=True)
    leaves = x, *(weight.value for weight in layer.trainable_weights)
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    loss = layer(x).square().sum()
    layer(7 * x, training=True)
    for found, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------- models


def test_fit_evaluate_and_predict():
    """The model learns to distinguish images that differ only in their channels' correlation, also in evaluation."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 256)
    mixing = np.stack([np.eye(3), [[1, 0, 0], [0.9, 0.4, 0], [0, 0, 1]]]).astype("float32")
    x = np.einsum("nhwc,ndc->nhwd", normal(256, 6, 6, 3), mixing[labels])
    model = network(IterNorm(group_size=5, momentum=0.9), keras.layers.ReLU(), GroupWhitening(2))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(True), metrics=["accuracy"])
    model.fit(x, labels, epochs=12, batch_size=50, verbose=0)
    _, accuracy = model.evaluate(x, labels, verbose=0)
    assert accuracy > 0.85
    predicted = model.predict(x, verbose=0)
    assert np.mean(predicted.argmax(1) == labels) == pytest.approx(accuracy)
    # Prediction uses no statistics of the batch.
    np.testing.assert_allclose(model.predict(x[:1], verbose=0), predicted[:1], atol=1e-4)


def test_images_of_several_sizes_go_through_one_model():
    model = network(IterNorm(group_size=4), GroupWhitening(5), shape=(None, None, 3))
    for size in (5, 8):
        model.fit(normal(9, size, size + 1, 3), normal(9, 2), batch_size=4, verbose=0)
        assert model.predict(normal(3, size, size, 3), verbose=0).shape == (3, 2)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_unknown_sizes_on_both_sides_of_the_channels():
    model = keras.Sequential([keras.Input((None, 6, None)), GroupWhitening(3, axis=2, iterations=2)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    for sizes in ((4, 6, 3), (5, 6, 2)):
        x = normal(7, *sizes)
        expected = pw.group_whiten(x, num_groups=3, axis=2, iterations=2)
        assert model.train_on_batch(x, x) == pytest.approx(np.mean((expected - x) ** 2), rel=1e-4)
        np.testing.assert_allclose(model.predict_on_batch(x), expected, atol=1e-4)


def test_a_last_batch_of_one_sample_is_left_out_of_the_averages():
    x, y = normal(9, 6), normal(9, 2)
    layer = IterNorm(momentum=0.5)
    model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(api.running(layer)["mean"], 0.5 * x[:8].mean(axis=0), atol=1e-6)


def test_time_distributed_layers_train_whatever_the_length():
    """For an unknown length, Keras uses TensorFlow's `vectorized_map`."""
    inner = keras.layers.Dense(8)
    layers = [inner, keras.layers.TimeDistributed(IterNorm()), keras.layers.TimeDistributed(GroupWhitening(2))]
    model = keras.Sequential([keras.Input((None, 5)), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = inner.get_weights()[0].copy()
    model.fit(normal(32, 4, 5), normal(32, 4, 1), verbose=0)
    assert np.max(np.abs(inner.get_weights()[0] - before)) > 1e-4


def test_averages_stay_finite_in_half_precision():
    layer = IterNorm(dtype="float16", track="covariance", momentum=0.5)
    for _ in range(3):
        layer(3000 * normal(64, 6), training=True)  # its variance 9e6 is above the largest float16
    assert all(np.all(np.isfinite(value)) for value in api.running(layer).values())


def test_averages_take_what_they_can_hold():
    """A variance of 1e5 is above the largest float16, but the hundredth of it that is averaged isn't."""
    x, layers = normal(400, 6) * 316, [IterNorm(dtype=d, track="covariance") for d in ("float16", "float32")]
    for layer in layers:
        layer(x, training=True)
    half, full = (api.running(layer)["covariance"].astype("float32") for layer in layers)
    np.testing.assert_allclose(half, full, rtol=2e-3, atol=1)
    assert np.min(np.diagonal(half[0])) > 500


class Subclassed(keras.Model):
    """A model written as in the code of many papers."""

    def __init__(self):
        super().__init__()
        self.inner = [keras.layers.Dense(8), IterNorm(group_size=4), GroupWhitening(2), keras.layers.Dense(2)]

    def call(self, x, training=False):
        for layer in self.inner:
            x = layer(x, training=training) if isinstance(layer, IterNorm) else layer(x)
        return x


def test_a_subclassed_model_trains():
    model = Subclassed()
    model.compile("adam", "mse")
    history = model.fit(normal(32, 5), normal(32, 5)[:, :2], epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_summary_counts_the_parameters():
    lines = []
    model = network(IterNorm(group_size=4), GroupWhitening(5))
    model.summary(print_fn=lines.append)
    text = " ".join(lines)
    affine, kernel, dense = 2 * 2 * 10, 3 * 3 * 3 * 10, 10 * 2 + 2
    moving = 10 + 3 * 4 * 4
    assert f"Trainable params: {affine + kernel + dense} " in text
    assert f"Non-trainable params: {moving} " in text


@pytest.mark.parametrize("track", ["whitener", "covariance"])
def test_copies_and_saved_models_predict_the_same(tmp_path, track):
    """This also holds in a new process that has only imported the layers, without `custom_objects`."""
    model = network(IterNorm(group_size=4, track=track), GroupWhitening(5, method="eigh"))
    x = normal(12, 6, 6, 3)
    model.fit(x, normal(12, 2), verbose=0)
    expected = model.predict(x, verbose=0)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(clone.predict(x, verbose=0), expected, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy, keras, polywhiten.keras; folder = sys.argv[1]\n"
        "model = keras.models.load_model(folder + '/model.keras')\n"
        "numpy.save(folder + '/y.npy', model.predict(numpy.load(folder + '/x.npy'), verbose=0))"
    )
    in_new_process(code, tmp_path, KERAS_BACKEND=BACKEND)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-6)


def test_weights_of_the_other_average_are_not_loaded(tmp_path):
    """They have the same shapes, and Keras tells variables apart by their order alone."""
    models = {
        track: keras.Sequential([keras.Input((4,)), IterNorm(track=track)]) for track in ("covariance", "whitener")
    }
    path = tmp_path / "model.weights.h5"
    models["covariance"].save_weights(path)
    models["covariance"].load_weights(path)
    with pytest.raises(ValueError, match="has track='whitener', and the saved weights are of track='covariance'"):
        models["whitener"].load_weights(path)


@pytest.mark.skipif(
    BACKEND == "torch", reason="Keras exports no model of its PyTorch backend, of its own layers either"
)
def test_an_exported_model_needs_tensorflow_alone(tmp_path):
    pytest.importorskip("tensorflow")
    model = network(IterNorm(group_size=4), GroupWhitening(5), shape=(None, None, 3))
    x = normal(12, 6, 6, 3)
    model.fit(x, normal(12, 2), verbose=0)
    model.export(tmp_path / "saved", verbose=False)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy, tensorflow; folder = sys.argv[1]\n"
        "model = tensorflow.saved_model.load(folder + '/saved')\n"
        "numpy.save(folder + '/y.npy', model.serve(numpy.load(folder + '/x.npy')))\n"
        "assert model.serve(tensorflow.zeros((2, 9, 7, 3))).shape == (2, 2)\n"
        "print('polywhiten' in sys.modules)"
    )
    assert in_new_process(code, tmp_path).strip() == "False"
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(x, verbose=0), atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="the other backends export to ONNX by way of other packages")
@pytest.mark.parametrize("shape", [(6, 6, 3), (None, None, 3)], ids=["of one size", "of any size"])
@pytest.mark.filterwarnings("ignore")  # PyTorch warns about tracing, with a class that may not exist
def test_a_model_exported_to_onnx_has_the_same_outputs(tmp_path, shape):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    layers = IterNorm(group_size=4), IterNorm(group_size=4, method="eigh", track="covariance"), GroupWhitening(5)
    model = network(*layers, shape=shape)
    x = normal(12, 6, 6, 3)
    model.fit(x, normal(12, 2), verbose=0)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: x[:5]})
    np.testing.assert_allclose(result, model.predict(x[:5], verbose=0), atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("make", [lambda p: IterNorm(group_size=4, dtype=p), lambda p: GroupWhitening(3, dtype=p)])
def test_dtype_policies(make, policy):
    """Layers compute in float32 under half-precision policies, so values too large for a float16 sum are whitened."""
    if policy == "float64" and BACKEND == "jax":
        pytest.importorskip("jax").config.update("jax_enable_x64", True)
    layer, x = make(policy), normal(16, 5, 5, 6).astype("float64") * 1e3
    y = layer(x, training=True) if isinstance(layer, IterNorm) else layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    assert {w.dtype for w in layer.weights} == {layer.variable_dtype}
    y = np.float64(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")))
    assert np.var(y) == pytest.approx(1, abs=0.5)


# ---------------------------------------------------------------- replicas

REPLICAS = """
import numpy as np, tensorflow as tf, keras
from polywhiten.keras import IterNorm
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])  # TensorFlow confuses several strategies
rng = np.random.default_rng(0)
x, y = rng.normal(size=(20, 6, 6, 3)).astype("float32"), rng.normal(size=(20, 2)).astype("float32")

def fitted(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((6, 6, 3)), keras.layers.Conv2D(7, 3, use_bias=False),
        IterNorm(group_size=3, momentum=0.5, **options),
        keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dense(2),
    ])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()

for options in ({}, {"track": "covariance", "method": "eigh"}):
    expected = fitted(**options)
    with strategy.scope():
        shared, apart = fitted(synchronized=True, **options), fitted(**options)
    print(*(max(np.abs(a - b).max() for a, b in zip(expected, other)) for other in (shared, apart)))

def masked(**options):
    layer = IterNorm(group_size=2, momentum=0.5, **options)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((6, 3)), keras.layers.Masking(), layer, keras.layers.Flatten(), keras.layers.Dense(2)
    ])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    sequences = x[:, 0] * (np.arange(6) < rng.integers(1, 7, (20, 1)))[..., None]
    model.fit(sequences, y, batch_size=10, shuffle=False, verbose=0)
    return model.get_weights()

state = rng.bit_generator.state
expected = masked()
rng.bit_generator.state = state
with strategy.scope():
    print(max(np.abs(a - b).max() for a, b in zip(expected, masked(synchronized=True))))

with strategy.scope():
    layer = IterNorm(momentum=0.5, synchronized=True)
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(2)])
    model.compile("sgd", "mse")
model.fit(x[:3, 0, 0], y[:3], batch_size=2, shuffle=False, verbose=0)  # 1 sample per replica, then 1 for both
print(np.abs(layer.moving_mean.numpy() - 0.5 * x[:2, 0, 0].mean(axis=0)).max())
"""


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_synchronized_replicas_train_as_one_device_on_the_joined_batch():
    *lines, masked, single = in_new_process(REPLICAS).splitlines()[-4:]
    assert float(masked) < 1e-5
    assert float(single) < 1e-6
    for shared, apart in (map(float, line.split()) for line in lines):
        assert shared < 1e-5
        assert apart > 1e-3  # separate statistics give results that differ visibly


@pytest.mark.skipif(BACKEND != "tensorflow", reason="graphs are TensorFlow's")
def test_layers_in_a_graph_of_the_users_own():
    import tensorflow as tf

    layer = IterNorm(axis=1, group_size=4, momentum=0.0)
    layer.build((None, 6, None))

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec([None, 6, None])])
    def step(x):
        return layer(x, training=True)

    x = normal(8, 6, 5)
    np.testing.assert_allclose(step(x), api.evaluate(layer, x), atol=1e-4)

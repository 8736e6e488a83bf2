"""What is special about TensorFlow: graphs of unknown sizes, XLA, nested tapes, and variables."""

import subprocess
import sys

import numpy as np
import pytest

import polywhiten as pw

tf = pytest.importorskip("tensorflow")

METHODS = ("newton", "eigh", "minimax")
CALLS = {"iter_norm": {"group_size": 4}, "group_whiten": {"num_groups": 3}}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def value_and_gradients(name, x, weight, bias, dy, **options):
    with tf.GradientTape() as tape:
        tape.watch((x, weight, bias))
        y = getattr(pw, name)(x, weight=weight, bias=bias, **options)
    return y, *tape.gradient(y, (x, weight, bias), dy)


@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_a_graph_of_unknown_sizes(name, method, axis, jit):
    """Batch and image size are unknown while the graph is traced, and the same graph is used for two sizes."""
    options = {"axis": axis, "method": method, **CALLS[name]}
    unknown = [None, 6, None, None] if axis == 1 else [None, None, None, 6]
    vector, array = tf.TensorSpec([6], "float64"), tf.TensorSpec(unknown, "float64")

    @tf.function(jit_compile=jit, input_signature=[array, vector, vector, array])
    def traced(x, weight, bias, dy):
        return value_and_gradients(name, x, weight, bias, dy, **options)

    weight, bias = normal(2, 6) + 2
    for n, size in ((8, 5), (5, 4)):
        x, dy = (np.moveaxis(a, 1, axis) for a in normal(2, n, 6, size, size + 1))
        expected, pullback = getattr(pw, f"{name}_vjp")(x, weight=weight, bias=bias, **options)
        for actual, wanted in zip(traced(x, weight, bias, dy), (expected, *pullback(dy)), strict=True):
            # XLA's eigh is accurate to 1e-8 only
            np.testing.assert_allclose(actual, wanted, atol=1e-6 if jit and method == "eigh" else 1e-9)
    assert traced.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_xla_in_every_precision(name, dtype):
    x, dy = (tf.cast(a, dtype) for a in normal(2, 8, 6, 5, 4))
    weight, bias = tf.ones(6, dtype), tf.zeros(6, dtype)
    eager = value_and_gradients(name, x, weight, bias, dy, **CALLS[name])
    compiled = tf.function(value_and_gradients, jit_compile=True)(name, x, weight, bias, dy, **CALLS[name])
    for a, b in zip(eager, compiled, strict=True):
        assert a.dtype == b.dtype == dtype
        step = 50 * float(pw.tensorflow.BACKEND.kernels.xp.finfo(a.dtype).eps)
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=step, atol=step * np.max(np.abs(np.float64(a))))


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, tf.function, lambda f: tf.function(f, jit_compile=True)],
    ids=["eager", "graph", "xla"],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_of_nested_tapes(name, method, wrap):
    x, direction = normal(2, 5, 6, 4)

    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(getattr(pw, name)(x, method=method, **CALLS[name]) ** 3)
        return tape.gradient(loss, x)

    @wrap
    def product(x):
        """Return the product of the Hessian with `direction`."""
        with tf.GradientTape() as tape:
            tape.watch(x)
            along = tf.reduce_sum(slope(x) * direction)
        return tape.gradient(along, x)

    step = 1e-5
    expected = (slope(tf.constant(x + step * direction)) - slope(tf.constant(x - step * direction))) / (2 * step)
    np.testing.assert_allclose(product(tf.constant(x)), expected, rtol=1e-5, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.parametrize("order", [1, 2])
def test_equal_eigenvalues_spoil_no_derivative(order):
    """TensorFlow's gradient of eigh divides by differences of eigenvalues."""
    cov, result = tf.eye(4, dtype="float64") * 2, None
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(cov)
        result = tf.reduce_sum(pw.inverse_sqrt(cov, method="eigh") ** 2)
        if order == 2:
            result = tf.reduce_sum(tape.gradient(result, cov) ** 2)
    # For eigenvalues l, the gradient of the sum of 1 / l is -1 / l^2, and that of the sum of its squares is -4 / l^5.
    np.testing.assert_allclose(
        tape.gradient(result, cov), np.eye(4) * (-1 / 4 if order == 1 else -4 / 2**5), atol=1e-12
    )


@pytest.mark.parametrize("call", [pw.iter_norm, lambda x: pw.group_whiten(x, num_groups=3)])
def test_vectorized_map_keeps_the_gradient(call):
    """`vectorized_map` ignores custom gradients, and maps the operations inside them."""
    x = tf.constant(normal(3, 8, 6))
    gradients = []
    for mapped in (tf.map_fn, tf.vectorized_map):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(mapped(call, x) ** 3)
        gradients.append(tape.gradient(loss, x))
    np.testing.assert_allclose(*gradients, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode(name, method):
    x, direction = (tf.constant(a) for a in normal(2, 8, 6, 4))
    call = lambda x: getattr(pw, name)(x, method=method, **CALLS[name])
    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        y = call(x)
    step = 1e-6
    expected = (call(x + step * direction) - call(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(accumulator.jvp(y), expected, atol=1e-6)


def test_variables_are_whitened_and_learnt():
    x, gamma = tf.Variable(normal(8, 6)), tf.Variable(tf.ones(6, "float64"))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(pw.iter_norm(x, weight=gamma) ** 3)
    dx, dgamma = tape.gradient(loss, (x, gamma))
    y, pullback = pw.iter_norm_vjp(x.numpy(), weight=np.ones(6))
    expected = pullback(3 * y**2)
    np.testing.assert_allclose(dx, expected[0], atol=1e-10)
    np.testing.assert_allclose(dgamma, expected[1], atol=1e-10)
    assert pw.inverse_sqrt(tf.Variable(tf.eye(3))).shape == (3, 3)


@pytest.mark.parametrize(("group_size", "expected"), [(16, False), (4, True)])
def test_channels_last_with_one_group_is_not_copied(group_size, expected):
    """With several groups, the data have to be copied, which shows that the test detects copies."""
    spec = tf.TensorSpec([None, None, None, 16], "float32")
    train = lambda x: value_and_gradients("iter_norm", x, tf.ones(16), tf.zeros(16), x, axis=-1, group_size=group_size)
    graph = tf.function(train).get_concrete_function(spec).graph

    def copies(operation):
        shape = operation.inputs[0].shape.as_list() if operation.inputs else []
        if None not in shape:
            return False  # a copy of statistics, not of data
        if operation.type == "Transpose":
            kept = [i for i in tf.get_static_value(operation.inputs[1]) if shape[i] != 1]
            return kept != sorted(kept)
        return operation.type == "Unpack" and len(operation.outputs) > 1

    assert any(map(copies, graph.get_operations())) == expected


@pytest.mark.parametrize(("samples", "groups", "apart"), [(4096, 2, True), (4096, 17, False), (100, 2, False)])
def test_rows_of_groups_one_by_one_and_in_a_batch_agree(samples, groups, apart):
    """On CPUs, a graph whitens a few groups of many samples one by one. Other graphs and eager calls use a batch."""
    x, dy = (np.random.default_rng(i).normal(size=(samples, 3 * groups)) for i in range(2))
    given = tf.constant(x), tf.ones(3 * groups, "float64"), tf.zeros(3 * groups, "float64"), tf.constant(dy)
    train = lambda *given: value_and_gradients("iter_norm", *given, axis=-1, group_size=3)
    concrete = tf.function(train, autograph=False).get_concrete_function(*given)
    cut = [o for o in concrete.graph.get_operations() if o.type == "Unpack" and o.outputs[0].shape == (samples, 3)]
    if all(device.device_type == "CPU" for device in tf.config.get_visible_devices()):
        assert bool(cut) == apart
    for graph, eager in zip(concrete(*given), train(*given), strict=True):
        np.testing.assert_allclose(graph, eager, atol=1e-10)


@pytest.mark.parametrize("known", ["x", "dy", "neither", "positions"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("iter_norm", {"axis": -1, "group_size": 4}),
        ("iter_norm", {"group_size": 4}),
        ("group_whiten", {"num_groups": 2}),
    ],
    ids=["channels last", "channels first", "group whitening"],
)
def test_sizes_that_only_x_or_its_gradient_knows(name, options, known):
    shape = (3, 3, 3, 8) if "axis" in options else (3, 8, 3, 3)
    unknown = [None if i == 0 or (known != "positions" and n == 3) else n for i, n in enumerate(shape)]
    specs = [tf.TensorSpec(shape if known == each else unknown, "float64") for each in ("x", "dy")]
    x, dy = (tf.constant(np.random.default_rng(i).normal(size=shape)) for i in range(2))
    weight, bias = tf.linspace(tf.constant(1.0, "float64"), 2.0, 8), tf.zeros(8, "float64")
    train = lambda x, dy: value_and_gradients(name, x, weight, bias, dy, **options)
    found = tf.function(train, input_signature=specs, autograph=False)(x, dy)
    for graph, eager in zip(found, train(x, dy), strict=True):
        np.testing.assert_allclose(graph, eager, atol=1e-10)


@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
@pytest.mark.parametrize("affine", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_group_whitening_of_a_float32_graph(affine, axis):
    """Channels-last graphs scale in one pass, which float64 and eager calls don't; a large mean costs few digits."""
    x, dy = (np.moveaxis(a, 1, axis).astype("float32") for a in (normal(4, 8, 5, 6) + 100, normal(4, 8, 5, 6, seed=1)))
    given = {name: np.linspace(0.5, 2, 8).astype("float32") for name in affine}
    options = {"num_groups": 4, "axis": axis}

    @tf.function
    def train(x, dy, given):
        with tf.GradientTape() as tape:
            tape.watch((x, given))
            y = pw.group_whiten(x, **given, **options)
        return y, tape.gradient(y, (x, given), dy)

    y, (dx, gradients) = train(tf.constant(x), tf.constant(dy), {name: tf.constant(v) for name, v in given.items()})
    exact = {name: np.float64(values) for name, values in given.items()}
    expected, pullback = pw.group_whiten_vjp(np.float64(x), **exact, **options)
    wanted = dict(zip(("x", "weight", "bias"), pullback(np.float64(dy)), strict=True))
    np.testing.assert_allclose(y, expected, atol=1e-4)
    for name, gradient in {"x": dx, **gradients}.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-4, atol=1e-4 * np.max(np.abs(wanted[name])))


@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
@pytest.mark.parametrize("first", [0, 30], ids=["alike", "first samples apart"])
def test_a_float32_graph_of_iter_norm_loses_no_digits_to_a_large_mean(first, axis):
    """A graph shifts data to about zero by some samples' mean, however far these are from the others."""
    x, dy = normal(2, 32, 8, 5, 6)
    x[:4] += first
    x, dy = (np.moveaxis(a, 1, axis).astype("float32") for a in (x + 1e4, dy))

    @tf.function
    def train(x, dy):
        weight, bias = tf.linspace(0.5, 2.0, 8), tf.zeros(8)
        stats = pw.whitening_stats(x, axis=axis, group_size=4)
        return *value_and_gradients("iter_norm", x, weight, bias, dy, axis=axis, group_size=4), stats.covariance

    exact = {"weight": np.linspace(0.5, 2, 8), "bias": np.zeros(8)}
    y, pullback = pw.iter_norm_vjp(np.float64(x), **exact, axis=axis, group_size=4)
    cov = pw.whitening_stats(np.float64(x), axis=axis, group_size=4).covariance
    for actual, wanted in zip(train(x, dy), (y, *pullback(np.float64(dy)), cov), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_computes_nothing_twice(name):
    """Newton's step takes 3 products, and 7 with its derivative, of which a training graph shares 3 with forward.

    The samples whose mean IterNorm subtracts are gathered once.
    """
    from tensorflow.python.eager import context  # there is no public way to see what is left of a graph

    def forward(x):
        return getattr(pw, name)(x, **dict.fromkeys(CALLS[name], 6))

    def train(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x)
        return y, tape.gradient(y, x)

    def count(operation, function):
        context.context().enable_graph_collection()
        tf.function(function, autograph=False)(tf.ones((8, 36, 5)))
        run = context.context().export_run_metadata()
        context.context().disable_graph_collection()
        return sum(operation in node.op for graph in run.partition_graphs for node in graph.node)

    steps = 4  # the first of five has no products
    assert 3 * steps < count("MatMul", forward)
    assert count("MatMul", train) - count("MatMul", forward) < 7 * steps
    assert count("Gather", train) == (name == "iter_norm")


AXES = [(rank, axis) for rank in range(2, 6) for axis in range(rank)]


def every_function(x, weight, bias, dy, axis):
    """Return outputs and gradients of all functions, with few of Newton's steps because graphs of more take seconds."""
    options, affine = {"axis": axis, "iterations": 2}, {"weight": weight, "bias": bias}
    whiten = value_and_gradients("iter_norm", x, weight, bias, dy, group_size=3, **options)
    stats = pw.whitening_stats(x, group_size=3, **options)
    found = [*whiten, *stats, pw.apply_whitening(x, stats, axis=axis, **affine)]
    if axis:
        found += value_and_gradients("group_whiten", x, weight, bias, dy, num_groups=2, **options)
    return found


def by_numpy(x, weight, bias, dy, axis):
    """Return the same as `every_function`, computed by NumPy."""
    options, affine = {"axis": axis, "iterations": 2}, {"weight": weight, "bias": bias}
    y, pullback = pw.iter_norm_vjp(x, group_size=3, **affine, **options)
    stats = pw.whitening_stats(x, group_size=3, **options)
    found = [y, *pullback(dy), *stats, pw.apply_whitening(x, stats, axis=axis, **affine)]
    if axis:
        y, pullback = pw.group_whiten_vjp(x, num_groups=2, **affine, **options)
        found += [y, *pullback(dy)]
    return found


def assert_any_size_is_whitened(rank, axis, jit):
    vector, array = (
        tf.TensorSpec([6], "float64"),
        tf.TensorSpec([6 if i == axis else None for i in range(rank)], "float64"),
    )
    run = lambda *given: every_function(*given, axis)
    traced = tf.function(run, jit_compile=jit, autograph=False, input_signature=[array, vector, vector, array])
    weight, bias = normal(2, 6) + 2
    for larger in (0, 1):
        shape = [(24, 5, 3, 2)[i] + larger for i in range(rank - 1)]
        shape.insert(axis, 6)
        x, dy = normal(2, *shape)
        for actual, wanted in zip(traced(x, weight, bias, dy), by_numpy(x, weight, bias, dy, axis), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-9)
    assert traced.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(("rank", "axis"), AXES)
def test_a_graph_in_which_the_channels_alone_are_known(rank, axis):
    assert_any_size_is_whitened(rank, axis, jit=False)


def test_xla_where_the_channels_alone_are_known():
    """There are positions on both sides of the channels; tests above compile channels first and channels last."""
    assert_any_size_is_whitened(4, 2, jit=True)


@pytest.mark.parametrize("known", ["x", "dy", "neither"])
def test_a_pullback_in_a_graph_of_unknown_sizes(known):
    """Not even the channels of dy have to be known, because many operations of TensorFlow lose them."""
    x, dy = normal(2, 5, 4, 6, 3)
    specs = [
        tf.TensorSpec(x.shape if known == "x" else [None, None, 6, None], "float64"),
        tf.TensorSpec(x.shape if known == "dy" else [None] * 4, "float64"),
    ]
    for name, options in CALLS.items():

        def pull(x, dy, name=name, options=options):
            y, pullback = getattr(pw, f"{name}_vjp")(x, weight=tf.ones(6, "float64"), axis=2, **options)
            return y, *pullback(dy)[:2]

        found = tf.function(pull, input_signature=specs, autograph=False)(x, dy)
        y, pullback = getattr(pw, f"{name}_vjp")(x, weight=np.ones(6), axis=2, **options)
        for actual, wanted in zip(found, (y, *pullback(dy)[:2]), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-9)


REPLICAS = """
import numpy as np, tensorflow as tf, polywhiten as pw
from polywhiten.tensorflow import sum_over_replicas
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x, dy = np.random.default_rng(0).normal(size=(2, 5, 6, 4)) + 1
weight = np.linspace(1, 2, 6)

@tf.function(reduce_retracing=True)
def step(x, dy):
    gamma = tf.constant(weight)
    with tf.GradientTape() as tape:
        tape.watch((x, gamma))
        y = pw.iter_norm(x, weight=gamma, group_size=4, all_reduce=sum_over_replicas)
    return y, *tape.gradient(y, (x, gamma), dy)

expected, pullback = pw.iter_norm_vjp(x, weight=weight, group_size=4)
dx, dweight, _ = pullback(dy)
for first in (3, 5):  # the second replica gets two samples, or no sample
    parts = [slice(0, first), slice(first, 5)]
    shares = [
        strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(a[parts[context.replica_id_in_sync_group]])
        )
        for a in (x, dy)
    ]
    for run in (step, step.python_function):
        results = [strategy.experimental_local_results(r) for r in strategy.run(run, shares)]
        joined = tf.concat(results[0], 0), tf.concat(results[1], 0), sum(results[2])
        for actual, wanted in zip(joined, (expected, dx, dweight), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-9)
"""


def test_replicas_with_unequal_shares_are_one_batch():
    command = [sys.executable, "-P", "-c", REPLICAS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_has_to_be_known_in_a_graph_is_named():
    def trace(shape):
        tf.function(pw.iter_norm).get_concrete_function(tf.TensorSpec(shape, "float32"))

    with pytest.raises(ValueError, match=r"\(None, None\): the channels, at axis=1, have to be known"):
        trace([None, None])
    with pytest.raises(ValueError, match="x has an unknown number of dimensions"):
        trace(None)
    for name in ("weight", "bias"):
        whiten = lambda values, name=name: pw.iter_norm(tf.ones((8, 6)), **{name: values})
        with pytest.raises(ValueError, match=f"{name} has an unknown number of dimensions"):
            tf.function(whiten).get_concrete_function(tf.TensorSpec(None, "float32"))
    with pytest.raises(ValueError, match="cov has an unknown number of dimensions"):
        tf.function(pw.inverse_sqrt).get_concrete_function(tf.TensorSpec(None, "float32"))


def test_ragged_and_sparse_tensors_are_refused_by_name():
    with pytest.raises(TypeError, match=r"x is a tensorflow.*RaggedTensor: pass a tensor"):
        pw.iter_norm(tf.ragged.constant([[1.0, 2.0], [3.0]]))
    with pytest.raises(TypeError, match=r"cov is a tensorflow.*SparseTensor: pass a tensor"):
        pw.inverse_sqrt(tf.sparse.eye(3))
    with pytest.raises(TypeError, match=r"weight is a tensorflow.*SparseTensor: pass a tensor"):
        pw.iter_norm(tf.ones((8, 3)), weight=tf.sparse.from_dense([1.0, 2.0, 3.0]))


def test_a_tape_keeps_the_input_and_little_else():
    """If the tape saw the centred copy and the iterates, it would keep them."""
    import gc

    x = tf.random.normal((64, 32, 32, 16))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = pw.iter_norm(x, axis=-1)
        gc.collect()
        large = [t for t in gc.get_objects() if type(t) is type(x) and t.shape.num_elements() >= 64 * 32 * 32]
    assert len(large) >= 2
    assert all(np.array_equal(t, x) or np.array_equal(t, y) for t in large)  # y is there under two names
    assert tape.gradient(y, x).shape == x.shape


def test_numpy_arrays_are_converted():
    """As by TensorFlow's own functions."""
    import polywhiten.tensorflow as own

    x, gamma = normal(8, 6), tf.Variable(np.linspace(0.5, 2, 6))
    with tf.GradientTape() as tape:
        y = own.iter_norm(x, weight=gamma)
        loss = tf.reduce_sum(y**3)
    assert tape.gradient(loss, gamma) is not None
    np.testing.assert_array_equal(y, pw.iter_norm(tf.constant(x), weight=gamma))
    np.testing.assert_allclose(tf.function(lambda: own.iter_norm(x, weight=gamma))(), y, atol=1e-12)
    stats = own.whitening_stats(x)
    results = (*stats, own.apply_whitening(x, stats), own.inverse_sqrt(np.eye(3)), own.group_whiten(x=x, num_groups=2))
    results += own.iter_norm_vjp(x)[0], own.group_whiten_vjp(x, num_groups=2)[0]
    assert all(tf.is_tensor(result) for result in results)


def test_gradients_of_unknown_rank_have_that_of_the_output():
    """As those of a loss that NumPy computes have in a graph."""
    x = tf.constant(normal(16, 8))

    @tf.custom_gradient
    def by_numpy(y):
        return tf.reduce_sum(y), lambda upstream: upstream * tf.numpy_function(np.cos, [y], tf.float64)

    for function in (pw.iter_norm, lambda x: pw.group_whiten(x, num_groups=2)):

        @tf.function
        def gradient(x, function=function):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = by_numpy(function(x))
            return tape.gradient(loss, x)

        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(function(x)))
        np.testing.assert_allclose(gradient(x), tape.gradient(loss, x), atol=1e-9)

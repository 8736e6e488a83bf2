"""What is special about Flax: the arguments of its own layers, its transformations, state and checkpoints."""

import inspect
import warnings
from functools import partial

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import export
from jax.sharding import PartitionSpec as P

import polywhiten as pw
from polywhiten.analysis import InfeasibleWarning
from polywhiten.flax import GroupWhitening, IterNorm

DEVICES = 4
# This has to be set before JAX starts, which happens in tests but not in imports.
jax.config.update("jax_num_cpu_devices", DEVICES)

# Few steps, as compiling takes most of the time here.
Whiten = partial(IterNorm, group_size=4, iterations=2, momentum=0.5)
GroupWhiten = partial(GroupWhitening, num_groups=3, iterations=2)
both = pytest.mark.parametrize("make", [Whiten, GroupWhiten], ids=["IterNorm", "GroupWhitening"])


@pytest.fixture(autouse=True)
def _float64_and_quick_compilation():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(*shape, seed=0, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, size=shape), dtype=dtype)


def made(make, channels=6, **arguments):
    """Return a layer in float64, with a scale and a bias that aren't those of a new layer."""
    initial = {"scale_init": nnx.initializers.normal(1.0), "bias_init": nnx.initializers.normal(1.0)}
    return make(channels, rngs=nnx.Rngs(0), **{"param_dtype": "float64", **initial, **arguments})


def averages(layer):
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)))


def assert_close(actual, expected, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@partial(nnx.jit, static_argnames="use_running_average")
def called(layer, x, **options):
    return layer(x, **options)


@nnx.jit
def step(layer, x, dy, mask=None):
    """Return the output of a layer, and the gradients of its parameters and of x."""

    def loss(layer, x):
        y = layer(x) if mask is None else layer(x, mask=mask)
        return (y * dy).sum(), y

    (_, y), (parameters, dx) = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, nnx.to_pure_dict(parameters), dx


# ---------------------------------------------------------------- beside Flax's own layers


@pytest.mark.parametrize(("ours", "theirs"), [(IterNorm, nnx.BatchNorm), (GroupWhitening, nnx.GroupNorm)])
def test_the_arguments_of_flax_own_layers_with_their_defaults(ours, theirs):
    mine, wanted = (inspect.signature(each).parameters for each in (ours, theirs))
    names = [name for name in wanted if name != "use_fast_variance"]
    assert [*mine][: len(names)] == names
    for name in set(names) - {"epsilon", "bias_init", "scale_init"}:  # one function has several names in Flax
        assert (mine[name].default, mine[name].kind) == (wanted[name].default, wanted[name].kind)
    mine, wanted = (inspect.signature(each.__call__).parameters for each in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in wanted.values()
    ]


@pytest.mark.parametrize(
    ("arguments", "shape", "mask"),
    [
        ({}, (8, 5, 6), None),
        ({"axis": 1, "use_scale": False, "momentum": 0.25, "epsilon": 0.1}, (8, 6, 5), None),
        ({"use_bias": False}, (8, 5, 6), (8, 5, 1)),
        ({}, (8, 5, 6), (5, 1)),
    ],
    ids=["last axis", "axis 1", "mask", "mask of fewer axes"],
)
def test_groups_of_one_channel_are_batch_normalization(arguments, shape, mask):
    """Random initial parameters are the same too, as they come from the same keys."""
    mask = None if mask is None else normal(*mask, seed=2) > 0
    exact = {"group_size": 1, "method": "eigh", "track": "covariance"}
    ours, theirs = made(IterNorm, **arguments, **exact), made(nnx.BatchNorm, use_fast_variance=False, **arguments)
    x, dy = normal(*shape), normal(*shape, seed=1)
    assert_close(step(ours, x, dy, mask), step(theirs, x, dy, mask))
    for layer in (ours, theirs):
        layer.eval()
    float32 = 1e-6  # in which Flax keeps its averages
    assert_close(ours.mean[...], theirs.mean[...], float32)
    assert_close(ours.covariance[...].squeeze(), theirs.var[...], float32)
    assert_close(step(ours, x, dy), step(theirs, x, dy), 100 * float32)


@pytest.mark.parametrize(
    ("arguments", "mask"),
    [({"num_groups": 1}, None), ({"num_groups": None, "group_size": 6, "use_bias": False}, (4, 5, 1))],
    ids=["num_groups", "group_size and mask"],
)
def test_one_group_is_group_normalization(arguments, mask):
    x, dy = normal(4, 5, 6), normal(4, 5, 6, seed=1)
    ours = made(GroupWhitening, method="eigh", epsilon=1e-6, **arguments)
    theirs = made(nnx.GroupNorm, use_fast_variance=False, **arguments)
    if mask is None:
        assert_close(step(ours, x, dy), step(theirs, x, dy))
    else:
        mask = normal(*mask, seed=2) > 0
        whole = jnp.broadcast_to(mask, x.shape)  # Flax's layer wants it for every channel
        assert_close(step(ours, x, dy, mask), step(theirs, x, dy, whole))


# ---------------------------------------------------------------- masks and axes


def test_masked_positions_are_left_out_of_a_batch():
    """Outputs, gradients and averages are those of a batch of the other positions alone."""
    x, dy, mask = normal(8, 5, 6), normal(8, 5, 6, seed=1), normal(8, 5, 1, seed=2) > 0
    kept = mask.squeeze(-1)
    padded, alone = made(Whiten), made(Whiten)
    y, parameters, dx = step(padded, x, jnp.where(mask, dy, 0), mask)
    assert_close((y[kept], parameters, dx[kept]), step(alone, x[kept], dy[kept]))
    assert_close(dx[~kept], jnp.zeros_like(dx[~kept]))
    assert_close(averages(padded), averages(alone))


def test_masked_positions_are_left_out_of_samples():
    x, dy, mask = normal(3, 7, 6), normal(3, 7, 6, seed=1), normal(3, 7, 1, seed=2) > 0
    layer = made(GroupWhiten)
    y, _, dx = step(layer, x, jnp.where(mask, dy, 0), mask)
    for i, kept in enumerate(mask.squeeze(-1)):
        alone, _, dalone = step(layer, x[i : i + 1, kept], dy[i : i + 1, kept])
        assert_close((y[i, kept], dx[i, kept]), (alone[0], dalone[0]))


@pytest.mark.parametrize("axes", [(2, 3), (-1, 0), (0, 1, 2, 3)], ids=str)
def test_reduction_axes_make_up_a_sample(axes):
    shape = (4, 2, 3, 6)
    x, layer = normal(*shape), made(GroupWhiten, reduction_axes=axes, use_scale=False, use_bias=False)
    expected = np.empty(shape)
    for index in np.ndindex(*(1 if axis in axes else shape[axis] for axis in range(3))):
        sample = tuple(slice(None) if axis in axes else i for axis, i in enumerate(index))
        rows = np.reshape(x[sample], (1, -1, 6))
        expected[sample] = pw.group_whiten(rows, num_groups=3, axis=2, iterations=2).reshape(expected[sample].shape)
    assert_close(called(layer, x), expected)


# ---------------------------------------------------------------- training and evaluation


class Network(nnx.Module):
    """A network as users write it."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norms = nnx.List([Whiten(6, rngs=rngs), GroupWhiten(6, rngs=rngs)])
        self.dense = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        for norm in self.norms:
            x = nnx.relu(norm(x))
        return self.dense(x.mean((1, 2)))


X, TARGETS = normal(8, 5, 5, 3, dtype="float32"), normal(8, 2, seed=1, dtype="float32")


def squared_error(network, x, targets):
    return jnp.square(network(x) - targets).mean()


def test_a_network_trains_alike_in_every_way_to_compile_it():
    """The ways are Flax's `nnx.jit` of modules and `jax.jit` of a function of their state."""
    by_flax = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(by_flax, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def train(network, optimizer):
        loss, gradients = nnx.value_and_grad(squared_error)(network, X, TARGETS)
        optimizer.update(network, gradients)
        return loss

    losses = [train(by_flax, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]

    graph, parameters, others = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def functional_train(parameters, others):
        def loss(parameters):
            network = nnx.merge(graph, parameters, others, copy=True)
            return squared_error(network, X, TARGETS), nnx.state(network, nnx.BatchStat)

        (value, others), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), others

    for expected in losses:
        loss, parameters, others = functional_train(parameters, others)
        assert_close(loss, expected, 1e-5)
    assert_close(nnx.to_pure_dict(others), averages(by_flax), 1e-5)


def test_what_chooses_between_batch_and_averages():
    """It is the argument of a call, then the attribute, which `eval`, `train` and `nnx.view` set."""
    x, layer = normal(8, 6), made(Whiten)
    by_batch = called(layer, x)
    before = averages(layer)
    by_averages = called(layer, x, use_running_average=True)
    assert jnp.abs(by_averages - by_batch).max() > 0.1
    assert_close(called(nnx.view(layer, use_running_average=True), x), by_averages)
    layer.eval()
    assert_close(called(layer, x), by_averages)
    assert_close(averages(layer), before)
    assert_close(called(layer, x, use_running_average=False), by_batch)
    layer.train()
    assert_close(called(layer, x), by_batch)
    with pytest.raises(ValueError, match="use_running_average=None doesn't say how to normalize"):
        made(Whiten, use_running_average=None)(x)


def test_attributes_can_be_set_later():
    x, layer = normal(8, 6), made(Whiten)
    layer.set_attributes(momentum=0.0, epsilon=0.5, group_size=4, method="eigh", iterations=None)
    assert_close(called(layer, x), called(made(IterNorm, group_size=4, epsilon=0.5, method="eigh"), x))
    assert_close(layer.mean[...], x.mean(0))


@pytest.mark.parametrize("track", ["whitener", "covariance"])
def test_an_untrained_layer_leaves_its_input_as_it_is(track):
    x = normal(8, 6)
    layer = made(IterNorm, group_size=4, track=track, method="eigh", use_scale=False, use_bias=False)
    assert_close(called(layer, x, use_running_average=True), x, 1e-5)


@both
def test_a_batch_of_no_samples_is_returned_empty(make):
    layer = made(make)
    before = averages(layer)
    assert layer(jnp.zeros((0, 5, 6))).shape == (0, 5, 6)
    assert_close(averages(layer), before)


def test_a_batch_of_one_sample_never_enters_the_averages():
    layer = made(Whiten)
    before = averages(layer)
    with pytest.warns(InfeasibleWarning):
        assert_close(called(layer, normal(1, 6)), layer.bias[...][None])
    called(layer, normal(4, 6), mask=jnp.asarray([[True], [False], [False], [False]]))
    assert_close(averages(layer), before)


# ---------------------------------------------------------------- dtypes


@both
def test_half_precision(make):
    """Outputs have the layer's dtype, but sums aren't taken in it: these variances overflow float16."""
    x, make = 1e3 * normal(64, 5, 6, dtype="float32"), partial(make, **({"momentum": 0} if make is Whiten else {}))
    for dtype in ("float16", "bfloat16"):
        layer, full = (made(make, dtype=each, param_dtype="float32") for each in (dtype, "float32"))
        for mode in ("train", "eval"):
            for each in (layer, full):
                getattr(each, mode)()
            y = called(layer, x)
            assert y.dtype == dtype
            np.testing.assert_allclose(y.astype("float32"), called(full, x), atol=0.1)
        assert_close(averages(layer), averages(full), 1e-2)


def test_evaluation_in_half_precision_subtracts_the_unrounded_mean():
    """Rounded to bfloat16, this mean would be off by a fifth of the standard deviation."""
    x = 100.3 + normal(512, 6, dtype="float32")
    layer = made(Whiten, momentum=0.0, dtype="bfloat16", use_scale=False, use_bias=False)
    called(layer, x)
    y = called(layer, x, use_running_average=True)
    np.testing.assert_allclose(y.astype("float32").mean(0), 0, atol=0.02)


@both
def test_dtypes_are_those_of_flax_own_layers(make):
    theirs = {Whiten: nnx.BatchNorm, GroupWhiten: partial(nnx.GroupNorm, num_groups=3)}[make]
    for dtype in (None, "bfloat16", "float32"):
        for param_dtype in ("bfloat16", "float32"):
            for given in ("bfloat16", "float32", "float64", "int32"):
                x = normal(4, 5, 6).astype(given)
                y, expected = (
                    jax.eval_shape(lambda x, f=f, a=(dtype, param_dtype): f(x, *a), x)
                    for f in (
                        lambda x, d, p: made(make, dtype=d, param_dtype=p)(x),
                        lambda x, d, p: made(theirs, dtype=d, param_dtype=p)(x),
                    )
                )
                assert y.dtype == expected.dtype, (dtype, param_dtype, given)


@pytest.mark.parametrize(("param_dtype", "expected"), [("bfloat16", "float32"), ("float64", "float64")])
def test_averages_keep_their_dtype_whatever_the_input(param_dtype, expected):
    layer = made(Whiten, param_dtype=param_dtype)
    for dtype in ("bfloat16", "float64"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # JAX warns if an assignment changes the dtype
            called(layer, normal(8, 6, dtype=dtype))
        assert {average.dtype for average in averages(layer).values()} == {jnp.dtype(expected)}
    assert layer.scale.dtype == layer.bias.dtype == param_dtype


def test_a_function_that_promotes_dtypes():
    """It gets the arrays that it gets in Flax's layers."""
    seen = []

    def promote(arrays, *, dtype):
        seen.append([None if array is None else array.shape for array in arrays])
        return tuple(None if array is None else array.astype("float32") for array in arrays)

    for make in (Whiten, partial(GroupWhiten, use_bias=False)):
        assert (
            jax.eval_shape(lambda x, make=make: made(make, promote_dtype=promote)(x), normal(8, 5, 6)).dtype
            == "float32"
        )
    assert seen == [[(8, 5, 6), (6,), (2, 4, 4), (6,), (6,)], [(8, 5, 6), (6,), None]]


# ---------------------------------------------------------------- transformations


def test_vmap_with_an_axis_name_shares_the_batch():
    x, dy = normal(8, 3, 6), normal(8, 3, 6, seed=1)
    shared, joined = made(Whiten, axis_name="parts"), made(Whiten)
    split = lambda a: a.reshape(4, 2, 3, 6)

    @nnx.jit
    def gradients(layer, x, dy):
        def loss(layer, x):
            y = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="parts")(layer, x)
            return (y * dy).sum(), y

        (_, y), (parameters, dx) = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, nnx.to_pure_dict(parameters), dx

    y, parameters, dx = gradients(shared, split(x), split(dy))
    assert_close((y.reshape(x.shape), parameters, dx.reshape(x.shape)), step(joined, x, dy))
    assert_close(averages(shared), averages(joined))


def test_vmap_with_an_axis_name_shares_masked_samples():
    x, mask = normal(8, 3, 6), normal(8, 3, 1, seed=2) > 0
    shared, joined = made(Whiten, axis_name="parts"), made(Whiten)
    call = nnx.vmap(lambda layer, x, mask: layer(x, mask=mask), in_axes=(None, 0, 0), axis_name="parts")
    y = nnx.jit(call)(shared, x.reshape(4, 2, 3, 6), mask.reshape(4, 2, 3, 1))
    assert_close(y.reshape(x.shape), called(joined, x, mask=mask))
    assert_close(averages(shared), averages(joined))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_positions_of_samples_can_be_spread_over_an_axis(masked):
    x, mask = normal(3, 8, 6), normal(3, 8, 1, seed=2) > 0
    shared, joined = made(GroupWhiten, axis_name="parts"), made(GroupWhiten)
    arrays = (x, mask) if masked else (x,)
    call = lambda layer: lambda x, mask=None: layer(x, mask=mask)
    split = [a.reshape(3, 4, 2, -1) for a in arrays]
    y = jax.jit(jax.vmap(call(shared), in_axes=1, out_axes=1, axis_name="parts"))(*split)
    assert_close(y.reshape(x.shape), jax.jit(call(joined))(*arrays))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_shard_map_shares_the_batch(masked):
    """It checks that all devices have the same averages."""
    x, joined = normal(8, 3, 6), made(Whiten)
    mask = normal(8, 3, 1, seed=2) > (0 if masked else -np.inf)
    options = lambda mask: {"mask": mask} if masked else {}
    graph, state = nnx.split(made(Whiten, axis_name="devices"))
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    def call(state, x, mask):
        layer = nnx.merge(graph, state, copy=True)
        return layer(x, **options(mask)), nnx.state(layer, nnx.BatchStat)

    specs, outputs = (P(), P("devices"), P("devices")), (P("devices"), P())
    y, new = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=outputs))(state, x, mask)
    assert_close(y, called(joined, x, **options(mask)))
    assert_close(nnx.to_pure_dict(new), averages(joined))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_groups_of_devices_share_the_batch():
    """JAX sums over groups of indices in `pmap` alone."""
    x = normal(DEVICES, 3, 6)
    layer = made(Whiten, axis_name="devices", axis_index_groups=[[0, 1], [2, 3]])
    graph, state = nnx.split(layer)
    y = jax.pmap(lambda x: nnx.merge(graph, state, copy=True)(x), axis_name="devices")(x)
    expected = [called(made(Whiten), x[i : i + 2]) for i in (0, 2)]
    assert_close(y, jnp.concatenate(expected))


def test_scan_over_layers():
    """Stacked layers in a scan do what they do one after the other, and keep their own averages."""

    def block_of(key):
        return nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(key), param_dtype="float64"), made(Whiten), nnx.relu)

    keys = jax.random.split(jax.random.key(0), 3)
    stacked, single = nnx.vmap(block_of)(keys), [block_of(key) for key in keys]
    scanned = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    x = expected = normal(8, 6)
    for block in single:
        expected = called(block, expected)
    assert_close(nnx.jit(scanned)(stacked, x), expected)
    rows = [averages(block) for block in single]
    assert_close(averages(stacked), jax.tree.map(lambda *a: jnp.stack(a), *rows))

    gradients = nnx.jit(nnx.grad(lambda stacked, x: scanned(stacked, x).sum()))(stacked, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_remat_recomputes_the_same():
    x, layers = normal(8, 6), (made(Whiten), made(Whiten))
    plain = lambda layer, x: (layer(x) ** 3).sum()
    results = [
        nnx.jit(nnx.value_and_grad(call, argnums=(0, 1)))(layer, x)
        for call, layer in zip((plain, nnx.remat(plain)), layers, strict=True)
    ]
    assert_close(*results)
    assert_close(*map(averages, layers))


def test_equal_layers_are_compiled_once():
    traced = []

    @nnx.jit
    def call(layer, x):
        traced.append(layer)
        return layer(x)

    options = {"axis_name": "devices", "axis_index_groups": [[0, 1], [2, 3]], "use_running_average": True}
    for _ in range(2):
        call(made(Whiten, **options), normal(8, 6))
    assert len(traced) == 1


def test_an_exported_layer_takes_any_batch_size():
    graph, state = nnx.split(made(Whiten))
    (batch,) = export.symbolic_shape("batch")
    for averaged in (False, True):
        call = jax.jit(lambda x, averaged=averaged: nnx.merge(graph, state, copy=True)(x, averaged))
        exported = export.export(call)(jax.ShapeDtypeStruct((batch, 5, 6), "float64"))
        x = normal(8, 5, 6)
        assert_close(exported.call(x), call(x))


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_orbax_restores_the_network(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    network = Network(nnx.Rngs(0))
    called(network, X)
    network.eval()
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(network))
        checkpointer.wait_until_finished()
        other = nnx.eval_shape(lambda: Network(nnx.Rngs(1)))
        graph, abstract = nnx.split(other)
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "state", abstract))
    restored.eval()
    np.testing.assert_array_equal(called(restored, X), called(network, X))


# ---------------------------------------------------------------- wrong use

WRONG = {
    "channels": (
        lambda: made(Whiten)(normal(8, 5)),
        r"x has shape \(8, 5\), with 5 channels at axis 1: num_features=6 of IterNorm",
    ),
    "channels of groups": (lambda: made(GroupWhiten)(normal(8, 5)), "num_features=6 of GroupWhitening"),
    "features": (lambda: made(Whiten, channels=0), "num_features=0 must be 1 or more"),
    "axis": (lambda: made(Whiten, axis=3)(normal(8, 6)), r"axis=3 holds no channels in shape \(8, 6\)"),
    "rank": (lambda: made(Whiten)(normal(6)), "at least 2 dimensions"),
    "rank of groups": (lambda: made(GroupWhiten)(jnp.ones(())), r"x has shape \(\): at least 1 dimension"),
    "momentum": (lambda: made(IterNorm, momentum=2), "momentum=2.0 must be from 0 to 1"),
    "epsilon": (lambda: made(IterNorm, epsilon=-1), "epsilon=-1.0 must be 0 or more"),
    "method": (lambda: made(GroupWhitening, method="zca", num_groups=3), "method='zca' is unknown"),
    "track": (lambda: made(IterNorm, track="variance"), "track='variance' is unknown"),
    "groups": (lambda: made(GroupWhitening, num_groups=4), "num_groups=4 doesn't divide 6 channels: use one of 1, 2"),
    "group size": (lambda: made(GroupWhitening, num_groups=None, group_size=4), "group_size=4 doesn't divide 6"),
    "both": (lambda: made(GroupWhitening, num_groups=3, group_size=2), "num_groups=3 and group_size=2: one of them"),
    "one value": (lambda: made(GroupWhitening, num_groups=6)(normal(4, 6)), r"\(4, 6\) gives 1 values a group"),
    "reduction": (
        lambda: made(GroupWhiten, reduction_axes=1)(normal(2, 5, 6)),
        r"reduction_axes=\(1,\) leaves out the channels",
    ),
    "no such axis": (lambda: made(GroupWhiten, reduction_axes=(1, 3))(normal(2, 5, 6)), r"reduction_axes=\(1, 3\) has"),
    "index groups": (lambda: made(IterNorm, axis_index_groups=[[0], [1]]), r"axis_index_groups=.* needs axis_name"),
    "mask": (lambda: made(Whiten)(normal(4, 5, 6), mask=jnp.ones((4, 1))), r"mask has shape \(4, 1\): \(4, 5, 1\)"),
    "mask of channels": (lambda: made(GroupWhiten)(normal(4, 5, 6), mask=jnp.ones((4, 5, 6))), "all channels or for n"),
}


@pytest.mark.parametrize(("use", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_an_axis_that_no_transformation_has():
    with pytest.raises(NameError, match="parts"):
        made(Whiten, axis_name="parts")(normal(8, 6))


INFEASIBLE = {
    "IterNorm": (IterNorm, (4, 6), "group_size=64 is infeasible: whitening 6 .* there are 4"),
    "GroupWhitening": (GroupWhiten, (4, 6), "num_groups=3 is infeasible: samples of d = 6 values"),
}


@pytest.mark.parametrize(("make", "shape", "message"), INFEASIBLE.values(), ids=INFEASIBLE)
def test_an_infeasible_call_warns_where_it_is(make, shape, message):
    with pytest.warns(InfeasibleWarning, match=message) as record:
        jax.eval_shape(lambda x: made(make)(x), normal(*shape))
    assert [warning.filename for warning in record] == [__file__]


def test_what_is_feasible_does_not_warn():
    """The devices of a joined batch have a share each; evaluation and masks have no demand that is known."""
    x = normal(4, 2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfeasibleWarning)
        jax.eval_shape(jax.vmap(lambda x: made(Whiten, axis_name="parts")(x), axis_name="parts"), x)
        jax.eval_shape(lambda x: made(Whiten)(x, True), x[0])
        jax.eval_shape(lambda x: made(Whiten)(x, mask=jnp.ones((2, 1))), x[0])

"""What is special about JAX: transformed gradients, mapped axes, symbolic sizes, and precisions of products."""

import inspect
import warnings
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import polywhiten as pw  # noqa: E402
import polywhiten.jax  # noqa: E402
from polywhiten.blocks import ChannelGroups, SampleGroups  # noqa: E402
from polywhiten.kernels import Kernels  # noqa: E402
from polywhiten.solvers import solver_for  # noqa: E402
from polywhiten.spec import WhiteningSpec  # noqa: E402

DEVICES = 4
# This has to be set before JAX starts, which happens in tests but not in imports.
jax.config.update("jax_num_cpu_devices", DEVICES)

# Compiling takes most of the time here, so there are as few steps and groups as possible.
METHODS = {"newton": {"method": "newton", "iterations": 2}, "eigh": {"method": "eigh"}}
FUNCTIONS = {"iter_norm": partial(pw.iter_norm, group_size=3), "group_whiten": partial(pw.group_whiten, num_groups=3)}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def _float64_and_quick_compilation():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(*shape, seed=0, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype=dtype)


def affine(channels=6):
    return jnp.linspace(0.5, 2, channels), jnp.linspace(-1, 1, channels)


def cubes(function, x, weight=None, bias=None, **arguments):
    return (function(x, weight=weight, bias=bias, **arguments) ** 3).sum()


def by_jax(name, method):
    """Return the function without polywhiten's gradient, so that JAX differentiates its operations."""
    plain = polywhiten.backend.Backend(Kernels(jnp))
    solver = solver_for(method["method"], method.get("iterations"))
    blocks = ChannelGroups(1, 3) if name == "iter_norm" else SampleGroups(1, 3)
    return partial(plain.whiten, WhiteningSpec(blocks, solver, 1e-5))


def squared_gradient(loss):
    """Return a function whose gradient depends on all second derivatives of `loss`, including the mixed ones."""
    return lambda *arguments: sum((g**2).sum() for g in jax.grad(loss, (0, 1, 2))(*arguments))


def assert_close(actual, expected, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, float(jnp.abs(b).max())))


@each_method
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives(name, method):
    arguments = normal(8, 6, 4), *affine()
    ours, theirs = (
        lambda *a: (partial(FUNCTIONS[name], **method)(a[0], weight=a[1], bias=a[2]) ** 3).sum(),
        lambda *a: (by_jax(name, method)(*a) ** 3).sum(),
    )
    for transform in (lambda f: f, squared_gradient):
        actual, expected = (jax.jit(jax.grad(transform(f), (0, 1, 2)))(*arguments) for f in (ours, theirs))
        assert_close(actual, expected)


def test_many_iterations_in_float32_work_in_float64_for_a_while():
    x, dy = normal(32, 6), normal(32, 6, seed=1)
    loss = lambda x, **arguments: (pw.iter_norm(x, **arguments) * dy.astype(x.dtype)).sum()
    second = lambda x, **arguments: jax.grad(lambda x: (jax.grad(partial(loss, **arguments))(x) ** 2).sum())(x)
    expected = second(x, method="eigh")
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns if it uses float32 in place of float64
        single = x.astype("float32")
        for arguments in ({"iterations": 15}, {"method": "minimax", "iterations": 5}):
            derivative = partial(second, **arguments)
            results = derivative(single), jax.jit(derivative)(single), jax.vmap(derivative)(single[None])[0]
            for result in results:
                assert result.dtype == "float32"
                np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


def test_second_derivatives_with_equal_eigenvalues():
    """JAX's derivative of eigh is NaN for equal eigenvalues."""
    x = normal(8, 4, 3).at[:, 2:].set(1.0)
    run = partial(cubes, partial(pw.iter_norm, method="eigh", eps=0.1))
    gradient = jax.jit(jax.grad(lambda x: (jax.grad(run)(x) ** 2).sum()))(x)
    assert jnp.isfinite(gradient).all()
    slope = jax.grad(lambda s: jnp.trace(pw.inverse_sqrt(s * jnp.eye(3), method="eigh")))
    assert_close(jax.jit(lambda s: (slope(s), jax.grad(slope)(s)))(1.0), (-3 / 2, 9 / 4))


@each_function
@each_method
def test_vmap_and_jacobians(function, method):
    xs = normal(2, 5, 6, 2)
    gradient = jax.grad(partial(cubes, partial(function, **method)))
    assert_close(jax.jit(jax.vmap(gradient))(xs), jnp.stack([*map(jax.jit(gradient), xs)]))
    direction = normal(5, 6, 2, seed=1)
    hessian = jax.jit(jax.jacrev(gradient))(xs[0])
    assert_close(
        jnp.einsum("abcdef,def->abc", hessian, direction),
        jax.jit(lambda x: jax.vjp(gradient, x)[1](direction)[0])(xs[0]),
    )


def test_second_derivative_of_an_input_that_vmap_does_not_map():
    """There y is mapped, but the statistics aren't. JAX's custom gradients would count these once per index."""
    x, weights = normal(8, 6), normal(3, 6, seed=1)

    def loss(x, over):
        return over(lambda weight: cubes(partial(pw.iter_norm, iterations=2), x, weight))(weights).sum()

    actual, expected = (
        jax.jit(jax.grad(squared_gradient(lambda x, _1, _2, over=over: loss(x, over))))(x, 0.0, 0.0)
        for over in (jax.vmap, lambda f: lambda rows: jnp.stack([f(row) for row in rows]))
    )
    assert_close(actual, expected)


@each_function
def test_checkpoint(function):
    arguments = normal(5, 6, 2), *affine()
    run = partial(cubes, partial(function, iterations=2))
    assert_close(
        jax.jit(jax.grad(jax.checkpoint(run), (0, 1, 2)))(*arguments), jax.jit(jax.grad(run, (0, 1, 2)))(*arguments)
    )


def test_statistics_are_differentiable():
    """JAX differentiates those of `whitening_stats`, and whitening's gradient those that layers get with y."""
    x = normal(9, 4)
    solver = solver_for("newton", 2)

    def beside_y(backend):
        spec = WhiteningSpec(ChannelGroups(1, 4), solver, 1e-5)
        return lambda x: backend.whiten_with_statistics(spec, x, None, None)[1]

    def alone(x):
        return pw.whitening_stats(x, iterations=2)

    plain = polywhiten.backend.Backend(Kernels(jnp))
    expected = jax.jit(jax.jacrev(beside_y(plain)))(x)
    for function in (alone, beside_y(polywhiten.jax.BACKEND)):
        assert_close(jax.jit(jax.jacrev(function))(x), expected)


@each_function
def test_backward_keeps_the_input_and_no_copy_of_it(function):
    x = normal(16, 6, 20, 20)
    for arguments in ({"iterations": 50}, dict(zip(("weight", "bias"), affine(), strict=True))):
        pullback = jax.eval_shape(lambda x, arguments=arguments: jax.vjp(partial(function, **arguments), x)[1], x)
        sizes = [array.size for array in jax.tree.leaves(pullback)]
        assert max(sizes) == x.size
        assert sum(sizes) < 1.05 * x.size


@each_function
@each_method
def test_nothing_but_the_dtype_of_x_without_64_bits(function, method):
    """In JAX's default mode, without float64, nothing in the core asks for float64."""
    with jax.enable_x64(False):
        for dtype in ("bfloat16", "float16", "float32"):
            arguments = normal(8, 6, 4, dtype=dtype), *(a.astype("float32") for a in affine())

            def run(*arguments):
                y, pullback = jax.vjp(lambda x, w, b: function(x, weight=w, bias=b, **method), *arguments)
                return y, *pullback(y)

            assert [a.dtype.name for a in jax.eval_shape(run, *arguments)] == [dtype, dtype, "float32", "float32"]


# Mapped axes

AXES = ("rows", "columns")


def shard_map(run, check, outputs):
    mesh = jax.make_mesh((2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = P(AXES), P(), P()
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outputs, check_vma=check)


WHOLE = partial(pw.iter_norm, group_size=3, iterations=2)
LOCAL = partial(polywhiten.jax.iter_norm, group_size=3, axis_name=AXES)


def mapped_losses():
    """Return losses of a batch whose parts are whitened with common statistics; gradients are taken outside the map."""

    def local(method, *arguments):
        return jax.lax.psum(cubes(partial(LOCAL, **method), *arguments), AXES)

    def by_vmap(method, x, weight, bias):
        share = partial(cubes, partial(LOCAL, **method))
        inner = jax.vmap(share, in_axes=(0, None, None), axis_name="columns")
        outer = jax.vmap(inner, in_axes=(0, None, None), axis_name="rows")
        return outer(x.reshape(2, 2, -1, *x.shape[1:]), weight, bias).sum()

    return {
        "shard_map": lambda method, *a: shard_map(partial(local, method), True, P())(*a),
        "shard_map unchecked": lambda method, *a: shard_map(partial(local, method), False, P())(*a),
        "vmap": by_vmap,
    }


@each_method
@pytest.mark.parametrize("loss", mapped_losses().values(), ids=mapped_losses())
def test_shares_of_a_batch_are_one_batch(loss, method):
    arguments = normal(8, 6, 4) + 2, *affine()
    whole = partial(cubes, partial(FUNCTIONS["iter_norm"], **method))
    actual, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*arguments) for f in (partial(loss, method), whole))
    assert_close(actual, expected)


@each_method
@pytest.mark.parametrize("loss", mapped_losses().values(), ids=mapped_losses())
def test_second_derivatives_of_shares_are_those_of_one_batch(loss, method):
    arguments = normal(8, 6, 4) + 2, *affine()
    whole = partial(cubes, partial(FUNCTIONS["iter_norm"], **method))
    actual, expected = (
        jax.jit(jax.grad(squared_gradient(f), (0, 1, 2)))(*arguments) for f in (partial(loss, method), whole)
    )
    assert_close(actual, expected)


def test_gradients_taken_on_every_device():
    """In shard_map, JAX sums the gradients of replicated arguments; in pmap, users have to."""
    arguments = normal(8, 6, 4) + 2, *affine()
    expected = jax.jit(jax.grad(partial(cubes, WHOLE), (0, 1, 2)))(*arguments)
    gradient = jax.grad(partial(cubes, partial(LOCAL, iterations=2)), (0, 1, 2))
    assert_close(jax.jit(shard_map(gradient, True, (P(AXES), P(), P())))(*arguments), expected)
    run = partial(cubes, partial(LOCAL, iterations=2, axis_name="devices"))
    gradient = jax.pmap(jax.grad(run, (0, 1, 2)), in_axes=(0, None, None), axis_name="devices")
    x, *replicated = arguments
    dx, *shares = gradient(x.reshape(DEVICES, -1, 6, 4), *replicated)
    assert_close([dx.reshape(x.shape), *(share.sum(axis=0) for share in shares)], expected)


def test_pullback_and_statistics_of_shares():
    x, (weight, bias) = normal(8, 6, 4) + 2, affine()
    dy = normal(8, 6, 4, seed=1)
    arguments = {"group_size": 3, "iterations": 2}

    def local(x, given, _):
        weight, dy = given
        share = jax.lax.axis_index(AXES) * x.shape[0]
        y, pullback = polywhiten.jax.iter_norm_vjp(x, weight=weight, axis_name=AXES, **arguments)
        dx, dweight, _ = pullback(jax.lax.dynamic_slice_in_dim(dy, share, x.shape[0]))
        stats = polywhiten.jax.whitening_stats(x, axis_name=AXES, **arguments)
        return y, dx, jax.lax.psum(dweight, AXES), tuple(stats)

    *results, stats = jax.jit(shard_map(local, True, (P(AXES), P(AXES), P(), P())))(x, (weight, dy), bias)
    y, pullback = pw.iter_norm_vjp(x, weight=weight, **arguments)
    assert_close(results, [y, *pullback(dy)[:2]])
    assert_close(stats, tuple(pw.whitening_stats(x, **arguments)))


def test_group_whitening_of_a_sharded_batch():
    """No statistics are shared, but the weight is replicated and its gradient is summed."""
    arguments = normal(8, 6, 4), *affine()
    run = partial(cubes, partial(FUNCTIONS["group_whiten"], iterations=2))
    actual = jax.jit(shard_map(jax.grad(run, (0, 1, 2)), True, (P(AXES), P(), P())))(*arguments)
    assert_close(actual, jax.jit(jax.grad(run, (0, 1, 2)))(*arguments))


@pytest.mark.parametrize("name", ["iter_norm", "iter_norm_vjp", "whitening_stats"])
def test_one_way_to_share_statistics(name):
    function = getattr(polywhiten.jax, name)
    with pytest.raises(ValueError, match=r"all_reduce=.* and axis_name='devices' .* pass one"):
        function(normal(8, 6), all_reduce=lambda x: x, axis_name="devices")
    with pytest.raises(NameError, match="devices"):
        function(normal(8, 6), axis_name="devices")


def test_functions_with_an_axis_name_take_all_other_arguments():
    """Each function passes all its other arguments on to the core function of the same name."""
    x, (weight, bias) = normal(8, 2, 6), affine(2)
    shared = {"group_size": 2, "axis": -2, "method": "minimax", "iterations": 1, "eps": 1e-2}
    scaled = {"weight": weight, "bias": bias, **shared}
    doubled = lambda a: 2 * a
    for name, arguments in (("iter_norm", scaled), ("iter_norm_vjp", scaled), ("whitening_stats", shared)):
        ours, theirs = (getattr(module, name)(x, all_reduce=doubled, **arguments) for module in (polywhiten.jax, pw))
        extended = inspect.signature(getattr(polywhiten.jax, name)).parameters
        assert [*extended] == [*inspect.signature(getattr(pw, name)).parameters, "axis_name"]
        assert "\naxis_name : hashable" in getattr(polywhiten.jax, name).__doc__
        if name == "iter_norm_vjp":
            ours, theirs = ((y, pullback(x)) for y, pullback in (ours, theirs))
        assert_close(ours, theirs, 0)


def test_numpy_arrays_are_converted():
    """As by JAX's own functions: batches come from NumPy, and constants in compiled functions are its arrays."""
    x, (weight, _) = np.random.default_rng(0).normal(size=(8, 6)), affine()
    assert_close(polywhiten.jax.iter_norm(x), pw.iter_norm(jnp.asarray(x)), 0)
    assert_close(polywhiten.jax.group_whiten(x=x, num_groups=2), pw.group_whiten(jnp.asarray(x), num_groups=2), 0)
    slope = jax.grad(lambda weight: (polywhiten.jax.iter_norm(x, weight=weight) ** 3).sum())
    assert_close(jax.jit(slope)(weight), slope(weight))
    stats = polywhiten.jax.whitening_stats(x)
    results = stats, polywhiten.jax.apply_whitening(x, stats), polywhiten.jax.inverse_sqrt(np.eye(3))
    results += polywhiten.jax.iter_norm_vjp(x)[0], polywhiten.jax.group_whiten_vjp(x, num_groups=2)[0]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(results))


def test_equal_axis_names_are_traced_once():
    traced = []

    @partial(jax.jit, static_argnames="all_reduce")
    def run(x, all_reduce):
        traced.append(all_reduce)
        return x

    for _ in range(2):
        run(normal(3), polywhiten.jax.psum("devices"))
    assert len(traced) == 1


def test_sparse_arrays_and_shapes_alone_are_refused_by_name():
    sparse = pytest.importorskip("jax.experimental.sparse")
    with pytest.raises(TypeError, match=r"x is a jax.*BCOO: pass a JAX array"):
        pw.iter_norm(sparse.BCOO.fromdense(normal(8, 6)))
    with pytest.raises(TypeError, match=r"cov is a jax.*ShapeDtypeStruct: pass a JAX array"):
        pw.inverse_sqrt(jax.ShapeDtypeStruct((3, 3), "float32"))


# Sizes and precisions


@pytest.mark.parametrize("shape", ["b, 6", "b, 6, h, w"])
def test_export_with_symbolic_sizes(shape):
    stats = pw.whitening_stats(normal(50, 6), group_size=3, method="eigh")
    weight, bias = affine()

    def evaluate(x):
        return pw.apply_whitening(x, stats, weight=weight, bias=bias)

    def train(x):
        y, pullback = jax.vjp(
            lambda *a: pw.iter_norm(a[0], weight=a[1], bias=a[2], group_size=3, method="eigh"), x, weight, bias
        )
        return y, pullback(y**2)

    def group(x):
        y, pullback = jax.vjp(lambda x: pw.group_whiten(x, num_groups=3, method="eigh"), x)
        return y, pullback(y**2)

    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float64)
    for function in (evaluate, train) if symbolic.ndim == 2 else (evaluate, train, group):
        exported = export.export(jax.jit(function))(symbolic)
        for sizes in ((2, 6, 3, 2), (9, 6, 1, 1)) if function is evaluate else ((9, 6, 3, 2),):
            x = normal(*sizes[: symbolic.ndim])
            assert_close(exported.call(x), jax.jit(function)(x))


@pytest.mark.parametrize(
    "shape", ["6, b", "6, b, c", "b, 6, c", "b, c, 6", "b, c, 6, d", "b, 6, c, d, e", "b, c, d, 6, e"]
)
def test_export_with_symbolic_sizes_around_the_channels(shape):
    sizes, (weight, bias) = {"6": 6, "b": 7, "c": 5, "d": 3, "e": 2}, affine()
    axis = shape.split(", ").index("6")
    x = normal(*(sizes[name] for name in shape.split(", ")))
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float64)
    for name in ("iter_norm", "group_whiten") if axis else ("iter_norm",):
        function, options = getattr(pw, name), {"axis": axis, "iterations": 2, **FUNCTIONS[name].keywords}

        def train(x, function=function, options=options):
            y, pullback = jax.vjp(lambda *a: function(a[0], weight=a[1], bias=a[2], **options), x, weight, bias)
            return y, pullback(y**2)

        affine_of_numpy = {"weight": np.asarray(weight), "bias": np.asarray(bias)}
        y, pullback = getattr(pw, f"{name}_vjp")(np.asarray(x), **affine_of_numpy, **options)
        assert_close(export.export(jax.jit(train))(symbolic).call(x), (y, pullback(y**2)))


def precisions(jaxpr):
    """Yield the precisions of all matrix products in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from precisions(inner)


@each_function
@each_method
def test_products_have_all_digits_unless_users_choose(function, method):
    """On GPUs and TPUs, JAX's default precision computes float32 products with fewer digits."""
    arguments = normal(8, 6, 4, dtype="float32"), *(a.astype("float32") for a in affine())
    run = partial(cubes, partial(function, **method))
    for program in (run, jax.grad(run, (0, 1, 2)), jax.grad(squared_gradient(run), (0, 1, 2))):
        found = list(precisions(jax.make_jaxpr(program)(*arguments).jaxpr))
        assert len(found) > 2
        assert {str(precision) for pair in found for precision in pair} == {"HIGHEST"}
    with jax.default_matmul_precision("bfloat16"):
        found = list(precisions(jax.make_jaxpr(run)(*arguments).jaxpr))
    assert all(precision is None or "HIGHEST" not in str(precision) for precision in found)


@pytest.mark.parametrize("transformation", [jax.jit, jax.vmap, jax.jacobian])
def test_the_estimator_says_that_it_cannot_be_traced(transformation):
    whitening = pw.Whitening().fit(np.random.default_rng(0).normal(size=(50, 3)))
    with pytest.raises(TypeError, match=r"X is traced by jax.jit.*affine_map"):
        transformation(whitening.transform)(jnp.ones((2, 4, 3)))

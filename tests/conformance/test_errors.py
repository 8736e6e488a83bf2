"""Wrong use raises an error that names the argument, its value, and what to pass instead."""

import numpy as np
import pytest

import polywhiten as pw

X = np.random.default_rng(0).normal(size=(4, 6, 3))
STATS = {"mean": np.zeros(5), "covariance": None, "whitener": np.eye(5)[None]}

WRONG = {
    "integers": ("iter_norm", {"x": np.ones((4, 6), dtype="int64")}, TypeError, "x has dtype .*int64.* floating"),
    "integer weight": (
        "iter_norm",
        {"x": X, "weight": np.ones(6, dtype="int64")},
        TypeError,
        "weight has dtype .*int64",
    ),
    "rank": ("iter_norm", {"x": np.ones(4)}, ValueError, r"x has shape \(4,\): at least 2 dimensions"),
    "axis": ("iter_norm", {"x": X, "axis": 3}, ValueError, r"axis=3 .* use 0 to 2"),
    "axis type": ("iter_norm", {"x": X, "axis": 1.0}, TypeError, r"axis=1.0 must be an integer"),
    "sample axis": ("group_whiten", {"x": X, "num_groups": 2, "axis": 0}, ValueError, r"axis=0 .* use 1 to 2"),
    "one sample": ("iter_norm", {"x": np.ones((1, 6))}, ValueError, r"\(1, 6\) gives 1 samples .* larger batch"),
    "no samples": ("iter_norm", {"x": np.ones((0, 6))}, ValueError, r"\(0, 6\) gives 0 samples"),
    "one value": (
        "group_whiten",
        {"x": X[:, :, 0], "num_groups": 6},
        ValueError,
        "gives 1 values a group: .* fewer than 6 groups",
    ),
    "groups": ("group_whiten", {"x": X, "num_groups": 4}, ValueError, "num_groups=4 doesn't divide 6 .* 1, 2, 3, 6"),
    "no groups": ("group_whiten", {"x": X, "num_groups": 0}, ValueError, "num_groups=0 doesn't divide 6"),
    "group type": ("group_whiten", {"x": X, "num_groups": 2.0}, TypeError, "num_groups=2.0 must be an integer"),
    "group size": ("iter_norm", {"x": X, "group_size": 0}, ValueError, "group_size=0 must be 1 or more"),
    "group size type": ("iter_norm", {"x": X, "group_size": "8"}, TypeError, "group_size='8' must be an integer"),
    "iterations": ("iter_norm", {"x": X, "iterations": 0}, ValueError, "iterations=0 must be 1 or more"),
    "iterations type": ("iter_norm", {"x": X, "iterations": 2.5}, TypeError, "iterations=2.5 must be an integer"),
    "needless": ("iter_norm", {"x": X, "method": "eigh", "iterations": 5}, ValueError, "iterations=5 has no meaning"),
    "method": (
        "iter_norm",
        {"x": X, "method": "zca"},
        ValueError,
        "method='zca' is unknown: use one of 'newton', 'eigh'",
    ),
    "eps": ("iter_norm", {"x": X, "eps": -1e-5}, ValueError, "eps=-1e-05 must be 0 or more"),
    "eps type": ("iter_norm", {"x": X, "eps": "1e-5"}, TypeError, "eps='1e-5' must be a number"),
    "eps infinite": ("iter_norm", {"x": X, "eps": float("inf")}, ValueError, "eps=inf must be 0 or more, and finite"),
    "no channels": ("iter_norm", {"x": np.ones((4, 0))}, ValueError, r"x has shape \(4, 0\): at least 1 channel"),
    "eps NaN": (
        "group_whiten",
        {"x": X, "num_groups": 2, "eps": float("nan")},
        ValueError,
        "eps=nan must be 0 or more",
    ),
    "weight": ("iter_norm", {"x": X, "weight": np.ones(5)}, ValueError, r"weight has shape \(5,\): .* 6 channels"),
    "bias": (
        "group_whiten",
        {"x": X, "bias": np.ones((6, 1)), "num_groups": 2},
        ValueError,
        r"bias has shape \(6, 1\)",
    ),
    "all_reduce": ("iter_norm", {"x": X, "all_reduce": "sum"}, TypeError, "all_reduce='sum' must be a function"),
    "statistics": ("apply_whitening", {"x": X, "stats": (0, 1)}, TypeError, "stats is a builtins.tuple: pass the Whit"),
    "square": ("inverse_sqrt", {"cov": np.ones((3, 4))}, ValueError, r"cov has shape \(3, 4\): square"),
}


@pytest.mark.parametrize(("function", "arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_argument(library, function, arguments, error, message):
    with pytest.raises(error, match=message):
        library.call(function, **arguments)


@pytest.mark.parametrize("function", ["iter_norm", "iter_norm_vjp", "whitening_stats"])
@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 5, 5), (4, 6, 0)], ids=str)
def test_functions_refuse_a_batch_of_no_samples(library, function, shape):
    """Only layers accept such a batch, and return it unchanged: it has no statistics that a function could return."""
    with pytest.raises(ValueError, match="gives 0 samples a channel: at least 2 are needed"):
        getattr(pw, function)(library.array(np.ones(shape)))


def test_statistics_of_another_size(library):
    stats = pw.WhiteningStats(*(library.array(s) for s in STATS.values()))
    with pytest.raises(ValueError, match=r"stats.mean has shape \(5,\): x has 6 channels"):
        library.call("apply_whitening", x=X, stats=stats)
    stats = stats._replace(mean=library.array(np.zeros(6)), whitener=library.array(np.zeros((2, 3, 2))))
    with pytest.raises(ValueError, match=r"stats.whitener has shape \(2, 3, 2\)"):
        library.call("apply_whitening", x=X, stats=stats)


def test_gradient_of_another_shape(library):
    _, pullback = pw.iter_norm_vjp(library.array(X))
    with pytest.raises(ValueError, match=r"dy has shape \(4, 6\): y has \(4, 6, 3\)"):
        pullback(library.array(X[:, :, 0]))


GROUPS = {"iter_norm": {"group_size": 4}, "group_whiten": {"num_groups": 3}}
WEIGHT, BIAS = np.linspace(1, 2, 6), np.linspace(-1, 1, 6)
DY = np.random.default_rng(1).normal(size=X.shape)


def beside(convert, convert_other):
    """Yield calls with the name of the argument that `convert_other` makes; `convert` makes the other arguments."""
    weight, bias, dy = map(convert, (WEIGHT, BIAS, DY))
    others = {"weight": convert_other(WEIGHT), "bias": convert_other(BIAS)}
    stats = pw.whitening_stats(X, group_size=4)
    own, other = (pw.WhiteningStats(*map(change, stats)) for change in (convert, convert_other))

    def pull(name, x, dy, **affine):
        y, pullback = getattr(pw, f"{name}_vjp")(x, **affine, **GROUPS[name])
        return y, *pullback(dy)

    def whiten(name, x, **affine):
        return (getattr(pw, name)(x, **affine, **GROUPS[name]),)

    for name in GROUPS:
        yield "weight", lambda x, name=name: whiten(name, x, weight=others["weight"], bias=bias)
        yield "bias", lambda x, name=name: whiten(name, x, bias=others["bias"])
        yield "weight", lambda x, name=name: pull(name, x, dy, **others)
        yield "dy", lambda x, name=name: pull(name, x, convert_other(DY), weight=weight, bias=bias)
    yield "stats.mean", lambda x: (pw.apply_whitening(x, other, weight=weight, bias=bias),)
    yield "stats.whitener", lambda x: (pw.apply_whitening(x, own._replace(whitener=other.whitener)),)
    yield "weight", lambda x: (pw.apply_whitening(x, own, **others),)


def assert_all_of(kind, x, calls, numpy):
    """Check that each call returns arrays of the class `kind`, with the values that it returns for NumPy arrays."""
    for (name, call), (_, plain) in zip(calls, beside(np.asarray, np.asarray), strict=True):
        for actual, expected in zip(call(x), plain(X), strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                assert type(actual) is kind, name
                np.testing.assert_allclose(numpy(actual), expected, atol=1e-10)


def assert_each_refuses(x, calls):
    for name, call in calls:
        with pytest.raises(TypeError, match=rf"^{name} is a .*: pass an? "):
            call(x)


def test_numpy_arrays_beside_those_of_a_library(library):
    """They are converted if the library's functions convert them; otherwise an error names the argument."""
    x, calls = library.array(X), beside(library.array, np.asarray)
    if library.value.takes_numpy:
        assert_all_of(type(x), x, calls, library.numpy)
    else:
        assert_each_refuses(x, calls)


def test_arrays_of_a_library_beside_numpys(library):
    """They are converted if NumPy's functions convert them."""
    calls = beside(np.asarray, library.array)
    if library.value.given_to_numpy:
        assert_all_of(np.ndarray, X, calls, np.asarray)
    else:
        assert_each_refuses(X, calls)


def test_numpy_arrays_of_wrong_shape_or_dtype_beside_those_of_a_library(library):
    if not library.value.takes_numpy:
        pytest.skip("it takes none")
    x = library.array(X)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\): .* 6 channels"):
        pw.iter_norm(x, weight=np.ones(5))
    with pytest.raises(TypeError, match=r"bias has dtype .*int"):
        pw.iter_norm(x, bias=np.ones(6, dtype="int32"))
    with pytest.raises(ValueError, match=r"dy has shape \(4, 6\): y has \(4, 6, 3\)"):
        pw.iter_norm_vjp(x)[1](X[:, :, 0])


def test_torch_tensors_of_another_device(library):
    if library.value.module != "torch":
        pytest.skip("other libraries' functions move arrays, or have an error of their own")
    x, elsewhere = library.array(X), library.array(X).to("meta")
    with pytest.raises(ValueError, match=r"weight is on meta and x on c.*: move it, as weight\.to\(x\.device\)"):
        pw.iter_norm(x, weight=elsewhere[0, :, 0])
    with pytest.raises(ValueError, match=r"dy is on meta and x on c"):
        pw.group_whiten_vjp(x, num_groups=3)[1](elsewhere)
    with pytest.raises(ValueError, match=r"stats\.mean is on meta and x on c"):
        pw.apply_whitening(x, pw.whitening_stats(elsewhere))


def test_what_is_no_array():
    with pytest.raises(TypeError, match=r"x is a builtins\.list: pass an array"):
        pw.iter_norm([[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"cov is a builtins\.float: pass an array"):
        pw.inverse_sqrt(1.0)
    with pytest.raises(TypeError, match="complex"):
        pw.iter_norm(X.astype(complex))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.ma.masked_array, np.matrix])
def test_arrays_with_other_operations(kind):
    x = kind(X[:, :, 0])
    for call in (pw.iter_norm, pw.whitening_stats, lambda x: pw.group_whiten(x, num_groups=2)):
        with pytest.raises(TypeError, match=rf"x is a .*{x.__class__.__name__}: pass a plain array"):
            call(x)


def test_a_dtype_that_numpy_does_not_know():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    with pytest.raises(TypeError, match="x has dtype bfloat16: whitening needs real floating-point values, convert it"):
        pw.iter_norm(X.astype(bfloat16))
    with pytest.raises(TypeError, match="weight has dtype bfloat16"):
        pw.iter_norm(X, weight=np.ones(6, bfloat16))

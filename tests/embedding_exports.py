"""What the tests of exported whitenings share: data, whitenings of every kind, and wrong arguments."""

import numpy as np
import pytest

import polywhiten

WHITENINGS = {
    "zca": {},
    "cholesky": {"method": "cholesky"},
    "fewer dimensions": {"method": "pca", "n_components": 5},
    "groups": {"group_size": 5},
    "unit length": {"method": "pca", "n_components": 5, "normalize": True},
}
each_whitening = pytest.mark.parametrize("arguments", WHITENINGS.values(), ids=WHITENINGS)


def embeddings(deviations=3.0):
    """Return 400 correlated rows of 12 features, whose means are so many deviations."""
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 12)) @ random.normal(size=(12, 12))
    return (x + deviations * x.std(axis=0)).astype("float32")


def integers():
    return np.clip(embeddings() * 10, -128, 127).astype("int8")


def fitted(x=None, **arguments):
    return polywhiten.Whitening(**arguments).fit(embeddings() if x is None else x)


def assert_refuses_what_is_not_fitted(export):
    """Check the errors that all exports have in common."""
    with pytest.raises(TypeError, match=r"whitening is a numpy.ndarray: pass a fitted polywhiten.Whitening"):
        export(embeddings())
    with pytest.raises(ValueError, match="fit") as raised:
        export(polywhiten.Whitening())
    assert type(raised.value).__name__ == "NotFittedError"
    with pytest.raises(ValueError, match=r"can't be exported in float32, .* multiply the embeddings by a constant"):
        export(fitted(embeddings().astype("float64") * 1e-44))

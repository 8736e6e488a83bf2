"""The estimator's base classes and the check of its input: scikit-learn's, or our own where that isn't installed."""

from __future__ import annotations

from typing import Any

import numpy as np

from polywhiten import checks
from polywhiten._types import Array

try:
    from sklearn import get_config
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import validate_data
except ImportError:
    from polywhiten.embeddings.without_sklearn import BaseEstimator, NotFittedError, TransformerMixin

    get_config = validate_data = None

__all__ = ["BaseEstimator", "NotFittedError", "TransformerMixin", "check_no_frames", "check_rows", "validated"]


def validated(estimator: Any, X: Any, reset: bool) -> Array:  # noqa: N803  # scikit-learn's name
    """Return lists, data frames and arrays of NumPy as a numeric array (n, d), as scikit-learn checks them.

    With `reset`, the estimator takes the number of features and their names from X; otherwise they have to be the same.
    """
    if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
        raise TypeError(
            "X has masked values, which NumPy's functions would take like others: pass X.filled(numpy.nan), and use "
            'on_nonfinite="skip" to leave out their rows'
        )
    if getattr(getattr(X, "dtype", None), "kind", "f") in "Mm":  # scikit-learn would take times for numbers
        raise TypeError(f"X has dtype {X.dtype}: real numbers are needed")
    if validate_data is not None:
        return validate_data(estimator, X, reset=reset, ensure_all_finite=False, dtype="numeric")
    rows = np.asarray(X)
    if rows.dtype.kind not in "fiub":
        raise TypeError(f"X has dtype {rows.dtype}: real numbers are needed")
    _check_names(estimator, X, reset)
    check_rows(estimator, rows, reset)
    return rows


def check_no_frames(estimator: Any) -> None:
    """Raise ValueError if scikit-learn is set to make data frames of outputs, which it can't do of an iterator."""
    if get_config is not None:
        own = getattr(estimator, "_sklearn_output_config", {}).get("transform")
        wanted = own or get_config()["transform_output"]
        if wanted != "default":
            raise ValueError(
                f'X is an iterator, of which set_output(transform="{wanted}") can\'t make a data frame: transform its '
                'batches one after the other, or use set_output(transform="default")'
            )


def _check_names(estimator: Any, X: Any, reset: bool) -> None:  # noqa: N803
    """Take the names of a data frame's columns, or check that they are those of `fit`, as scikit-learn does."""
    names = list(getattr(X, "columns", ()))
    named = bool(names) and all(isinstance(name, str) for name in names)
    if reset:
        vars(estimator).pop("feature_names_in_", None)
        if named:
            estimator.feature_names_in_ = np.asarray(names, dtype=object)
    elif named and hasattr(estimator, "feature_names_in_") and names != list(estimator.feature_names_in_):
        raise ValueError(
            f"X has columns {names}: they should match the feature names that were passed during fit, "
            f"{list(estimator.feature_names_in_)}"
        )


def check_rows(estimator: Any, rows: Array, reset: bool) -> None:
    """Check that an array has rows, and as many dimensions as the estimator was fitted to; or let it take these."""
    if rows.ndim != 2:
        raise ValueError(f"X has shape {tuple(rows.shape)}: 2 dimensions, rows (n, d), are needed")
    features = int(rows.shape[1])
    if reset:
        estimator.n_features_in_ = checks.check_positive("the number of X's dimensions", features)
    elif features != estimator.n_features_in_:
        expected = f"{type(estimator).__name__} is expecting {estimator.n_features_in_} features"
        raise ValueError(f"X has {features} features, but {expected}")

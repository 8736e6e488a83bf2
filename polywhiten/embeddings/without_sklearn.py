"""The part of scikit-learn's base classes that the estimator needs where scikit-learn isn't installed."""

from __future__ import annotations

import inspect
from typing import Any


class NotFittedError(ValueError, AttributeError):
    """An estimator is used before it is fitted; inherits what scikit-learn's error of this name inherits."""


class BaseEstimator:
    """An estimator whose parameters are the arguments of its constructor, and attributes of the same names."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters; no parameter is an estimator that `deep` could look into."""
        del deep
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Any:
        """Set parameters by name, and return the estimator."""
        names = self.get_params()
        for name, value in params.items():
            if name not in names:
                raise ValueError(f"{name}={value!r} is no parameter of {type(self).__name__}: use {', '.join(names)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = (
            f"{name}={value!r}" for name, value in self.get_params().items() if value is not defaults[name].default
        )
        return f"{type(self).__name__}({', '.join(changed)})"


class TransformerMixin:
    """A transformer, whose `fit_transform` fits and transforms the same data."""

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:  # noqa: N803  # scikit-learn's name
        """Fit to X, and return X transformed."""
        estimator: Any = self
        return estimator.fit(X, y, **fit_params).transform(X)

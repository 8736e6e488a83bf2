"""The estimator: it takes the moments of rows, and whitens rows by the map that follows from them."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from polywhiten import checks
from polywhiten._types import Array
from polywhiten.analysis.conditioning import spectrum
from polywhiten.backend import Backend, namespace_of
from polywhiten.dispatch import backend_of, framework_module
from polywhiten.embeddings import sklearn_base
from polywhiten.embeddings.recipe import Recipe
from polywhiten.embeddings.storage import read_state, write_state
from polywhiten.moments import Float64, Moments
from polywhiten.rows import RowInput, RowMap

NOT_REAL = "cSUTMm"  # the kinds of NumPy's dtypes of complex numbers, text and times, which it would convert


class Whitening(sklearn_base.TransformerMixin, sklearn_base.BaseEstimator):  # type: ignore[misc]
    r"""Whiten rows of data, such as embeddings: centre them, and remove the correlation between their dimensions.

    .. math:: y = W (x - \mu), \quad W (\Sigma + \epsilon I) W^T = I

    for the mean :math:`\mu` and the covariance :math:`\Sigma` (divided by the number of rows) of the data that the
    estimator was fitted to. It is an estimator of scikit-learn if that is installed, and works alike without it.

    Parameters
    ----------
    method : {"zca", "pca", "cholesky", "zca_cor", "newton"}
        Which of the matrices W to take, which differ by a rotation. "zca": the symmetric one; of all white outputs,
        those are closest to the data. "pca": the outputs are the principal components, the largest first, divided by
        their deviation. "cholesky": upper triangular, an output depends on its own dimension and later ones. "zca_cor":
        "zca" of data divided by their deviation, the outputs correlate most with the data. "newton": a partial "zca" by
        IterNorm's iteration, which leaves directions of small variance small.
    n_components : int or float, optional
        Number of principal components to keep, or the share of the variance, above 0 and below 1, that they have to
        have together. Of "pca" this is the number of outputs; the other methods project the data onto the components.
    group_size : int, optional
        Only dimensions within groups of so many are whitened together; the last group may be smaller. `n_components`
        then applies to each group.
    iterations : int, optional
        Steps of "newton", 5 by default.
    eps : float
        Added to the variances. It bounds how much noise is amplified in directions of small variance.
    relative_eps : bool
        Whether eps is a fraction of the mean variance, trace of the covariance divided by d, instead of an absolute
        number. Embeddings of length 1 in d dimensions have variances of about 1 / d. For "zca_cor" it is a fraction
        of each dimension's own variance.
    shrinkage : float or "ledoit_wolf"
        Replaces the covariance by (1 - shrinkage) times itself plus shrinkage times the mean variance times the
        identity, or for "zca_cor" times the diagonal of the covariance. "ledoit_wolf" estimates the number from the
        data, for few rows; see `sklearn.covariance.LedoitWolf`.
    normalize : bool
        Whether outputs are divided by their length, as for cosine similarity.
    scale : float or array, shape (d,), optional
        Data are multiplied by it, such as embeddings that are quantized to int8.
    on_nonfinite : {"raise", "skip"}
        What to do with rows that contain NaN or infinity. "skip": statistics leave them out, and count them in
        `n_skipped_`; their outputs are NaN.

    Attributes
    ----------
    mean_ : array, shape (d,)
        Mean of the data, in float64, as all attributes.
    matrix_ : array, shape (k, d)
        W.
    covariance_ : array, shape (d, d)
        Covariance of the data, without eps and shrinkage.
    eigenvalues_ : array, shape (d,)
        Its eigenvalues, the largest first.
    shrinkage_ : float
        The shrinkage that was used.
    n_components_ : int
        Number of principal components that were kept.
    n_features_in_, n_samples_seen_, n_skipped_ : int
        d, the number of rows, and how many more were left out.
    moments_ : polywhiten.moments.Moments
        The state that `partial_fit` and `+` continue.

    See Also
    --------
    polywhiten.whitening_stats : For activations, with gradients and groups of channels.

    Notes
    -----
    Moments are kept in float64. They are taken in one pass, and those of batches are merged exactly: `partial_fit` in
    any order gives what `fit` gives, up to rounding. Products are computed in the dtype of the data, or in float32 for
    half precision, over at most 2^24 values before they are added up in float64.

    Arrays may be of any library that follows the array API; outputs have the library, the device and the dtype of the
    input, but are float32 or float64 for integers. Dask's arrays stay lazy in `transform`. Gradients aren't computed.

    References
    ----------
    Kessy, Lewin and Strimmer, Optimal Whitening and Decorrelation, The American Statistician 2018, arXiv:1512.00809.
    Su et al., Whitening Sentence Representations for Better Semantics and Faster Retrieval, 2021, arXiv:2103.15316.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> x = np.random.default_rng(0).normal(size=(1000, 8)) @ np.triu(np.ones((8, 8)))
    >>> y = pw.Whitening().fit_transform(x)
    >>> bool(np.allclose(y.T @ y / 1000, np.eye(8), atol=1e-3))
    True
    >>> a, b = (pw.Whitening("pca", n_components=3).fit(part) for part in (x[:200], x[200:]))
    >>> (a + b).transform(x).shape
    (1000, 3)
    """

    def __init__(
        self,
        method: str = "zca",
        *,
        n_components: int | float | None = None,
        group_size: int | None = None,
        iterations: int | None = None,
        eps: float = 1e-5,
        relative_eps: bool = True,
        shrinkage: float | str = 0.0,
        normalize: bool = False,
        scale: Any = None,
        on_nonfinite: str = "raise",
    ) -> None:
        self.method = method
        self.n_components = n_components
        self.group_size = group_size
        self.iterations = iterations
        self.eps = eps
        self.relative_eps = relative_eps
        self.shrinkage = shrinkage
        self.normalize = normalize
        self.scale = scale
        self.on_nonfinite = on_nonfinite

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Whitening:  # noqa: N803  # scikit-learn's name
        """Take the statistics of data, and forget those of earlier data.

        Parameters
        ----------
        X : array, shape (n, d), or iterator of such arrays
            Floating point or integers.
        y : None
            Not used; scikit-learn's pipelines pass it.
        sample_weight : array, shape (n,), optional
            The rows' weights, 0 or more. A weight of 2 counts as two equal rows, and rows of weight 0 don't count. The
            weights' unit doesn't matter, except for "ledoit_wolf", which takes their sum for the number of rows: don't
            divide them by it.

        Returns
        -------
        Whitening
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            A parameter or the data don't fit. The estimator stays as it was.
        """
        fitted = type(self)(**self.get_params(deep=False))
        fitted.partial_fit(X, y, sample_weight)
        fitted._fitted_map()
        self.__dict__.pop("feature_names_in_", None)
        self.__dict__.update(fitted.__dict__)
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Whitening:  # noqa: N803
        """Add a batch of data to the statistics; the arguments are those of `fit`.

        A batch may have a single row; `transform` needs two in all. The matrix is computed when it is first needed.
        Of an iterator, either all batches are added or, if one of them doesn't fit, none. Threads need estimators of
        their own, which `+` merges.
        """
        del y
        recipe = Recipe.of(vars(self))
        if isinstance(X, Iterator):
            if sample_weight is not None:
                raise ValueError("sample_weight is for an array X: pass batches to partial_fit, each with its weights")
            total = copy.copy(self)
            for batch in X:
                total.partial_fit(batch)
            if not total.__sklearn_is_fitted__():
                raise ValueError("X is an iterator without batches: at least one array (n, d) is needed")
            self.__dict__.update(vars(total))
            return self
        known = vars(self).get("_moments")
        if known is not None:
            self._recipe.check_same_scale(recipe)
        backend, rows = self._rows(X, reset=known is None)
        recipe.check_dimension(rows.shape[1])
        weights = None if sample_weight is None else _checked_weights(sample_weight, rows.shape[0])
        moments = backend.moments(rows, weights, recipe.read, fourth=recipe.needs_fourth_moment)
        if weights is not None:  # a row without weight gives a covariance no rank
            moments = replace(moments, count=min(moments.count, int(np.count_nonzero(weights))))
        self.moments_ = moments if known is None else known + moments
        return self

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:  # noqa: N803
        """Fit to an array, and return its rows whitened; the arguments are those of `fit`.

        Raises
        ------
        TypeError
            X is an iterator, which can be read only once.
        """
        if isinstance(X, Iterator):
            raise TypeError(
                "X is an iterator, which can be read only once: fit to one, and transform another of the same batches"
            )
        return super().fit_transform(X, y, **fit_params)

    def transform(self, X: Any) -> Any:  # noqa: N803
        """Whiten rows.

        Parameters
        ----------
        X : array, shape (n, d), or iterator of such arrays
            Floating point or integers.

        Returns
        -------
        array, shape (n, k), or iterator of such arrays
            In the library, device and dtype of X, but float32 for integers of up to 16 bits, float64 for longer ones.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            The estimator isn't fitted.
        TypeError, ValueError
            X doesn't fit, or has NaN or infinity and `on_nonfinite` is "raise".
        """
        row_map = self._fitted_map()
        if isinstance(X, Iterator):
            sklearn_base.check_no_frames(self)
            return (self.transform(batch) for batch in X)
        backend, rows = self._rows(X, reset=False)
        return backend.map_rows(rows, row_map, self._recipe.read)

    def inverse_transform(self, X: Any) -> Any:  # noqa: N803
        """Return the data that `transform` whitens to X, or the nearest there are if X has fewer dimensions.

        Parameters
        ----------
        X : array, shape (n, k), or iterator of such arrays
            White rows, floating point.

        Returns
        -------
        array, shape (n, d), or iterator of such arrays
            In the library, device and dtype of X.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            The estimator isn't fitted.
        TypeError, ValueError
            X doesn't fit, or `normalize` has removed the length of the rows.
        """
        row_map = self._fitted_map()
        if row_map.normalize:
            raise ValueError(
                "normalize=True removes the length of rows, so they can't be restored: fit with normalize=False"
            )
        if isinstance(X, Iterator):
            return (self.inverse_transform(batch) for batch in X)
        backend, rows = _as_rows(X)
        if rows.ndim != 2 or rows.shape[1] != len(self.matrix_):
            raise ValueError(
                f"X has shape {tuple(rows.shape)}: rows of {len(self.matrix_)} white dimensions are needed"
            )
        read = RowInput(skip_nonfinite=self._recipe.read.skip_nonfinite)
        return backend.map_rows(rows, row_map.inverse(self._recipe.read.scale), read)

    def __add__(self, other: Whitening) -> Whitening:
        """Return an estimator with the statistics of the data of both, which need the same parameters."""
        if not isinstance(other, Whitening):
            return NotImplemented
        for name, value in self.get_params(deep=False).items():
            theirs = getattr(other, name)
            if not np.array_equal(value, theirs):
                raise ValueError(
                    f"{name}={value!r} and {name}={theirs!r} differ: merge estimators with equal parameters"
                )
        merged = type(self)(**self.get_params(deep=False))
        merged.moments_ = self.moments_ + other.moments_
        for each in (self, other):
            each._recipe.check_same_scale(merged._recipe)
        names = [list(each.feature_names_in_) for each in (self, other) if hasattr(each, "feature_names_in_")]
        if len(names) == 2 and names[0] != names[1]:
            raise ValueError(f"feature_names_in_={names[0]} and {names[1]} differ: merge estimators of equal features")
        if hasattr(self, "feature_names_in_"):
            merged.feature_names_in_ = self.feature_names_in_
        return merged

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Return the names of the outputs: those of the input, or "whitening0", "whitening1" ... for method "pca".

        Parameters
        ----------
        input_features : sequence of str, optional
            Names of the input; by default those of the data frame that the estimator was fitted to, or "x0", "x1" ...

        Returns
        -------
        array of str, shape (k,)
        """
        outputs, known = len(self.matrix_), getattr(self, "feature_names_in_", None)
        names = [f"x{i}" for i in range(self.n_features_in_)] if known is None else known
        if input_features is not None:
            names = list(input_features)
            if known is not None and names != list(known):
                raise ValueError("input_features is not equal to feature_names_in_")
            if len(names) != self.n_features_in_:
                raise ValueError(
                    f"input_features should have length equal to number of features ({self.n_features_in_}), "
                    f"got {len(names)}"
                )
        if self._recipe.method == "pca":
            names = [f"whitening{i}" for i in range(outputs)]
        return np.asarray(names, dtype=object)

    def affine_map(self) -> tuple[Float64, Float64]:
        """Return A (k, d) and b (k,), in float64, with which y = A x + b, before `normalize`; for other software.

        In float32, A (x - mean), which `transform` computes, keeps more digits if the mean is far above the spread.
        """
        row_map, scale = self._fitted_map(), self._recipe.read.scale
        weight = row_map.matrix if scale is None else row_map.matrix * scale
        return weight, -row_map.matrix @ row_map.mean

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a file, which can be loaded, used, merged and fitted further.

        The loaded one transforms as this one does: parameters that were set since `fit` aren't in the file.

        Parameters
        ----------
        path : path
            Ends with ".npz", or with ".safetensors", which needs the package of this name.
        """
        arrays, numbers = self.moments_.parts()
        arrays["matrix"], parameters = self.matrix_, self._recipe.parameters()
        if isinstance(parameters["scale"], np.ndarray):
            arrays["scale"] = parameters.pop("scale")
        names = getattr(self, "feature_names_in_", None)
        fields = {
            "parameters": parameters,
            **numbers,
            "feature_names": None if names is None else list(names),
        }
        write_state(path, arrays, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Whitening:
        """Return the estimator that `save` wrote to a file.

        Raises
        ------
        OSError
            The file can't be read.
        ValueError
            It has no such estimator, or is damaged.
        """
        arrays, fields = read_state(path)
        try:
            parameters = {**fields["parameters"], **({"scale": arrays["scale"]} if "scale" in arrays else {})}
            moments = Moments.of_parts(arrays, fields)
            loaded = cls(**parameters)
            loaded.moments_ = moments
            square, columns = moments.scatter.shape, arrays["matrix"].shape[1:]
            if moments.mean.ndim != 1 or square != 2 * moments.mean.shape or columns != moments.mean.shape:
                raise ValueError("the shapes of its arrays don't fit together")
            if fields["feature_names"] is not None:
                loaded.feature_names_in_ = np.asarray(fields["feature_names"], dtype=object)
            loaded._row_map = loaded._recipe.with_matrix(moments.mean, arrays["matrix"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or of another version: {error}") from error
        return loaded

    @property
    def moments_(self) -> Moments:
        self._check_fitted()
        return self._moments

    @moments_.setter
    def moments_(self, moments: Moments) -> None:
        recipe, dimension = Recipe.of(vars(self)), len(moments.mean)
        recipe.check_dimension(dimension)
        self._moments: Moments = moments
        self._recipe = recipe
        self._row_map: RowMap | None = None
        self.n_features_in_ = dimension

    @property
    def mean_(self) -> Float64:
        return self.moments_.mean

    @property
    def matrix_(self) -> Float64:
        return self._fitted_map().matrix

    @property
    def covariance_(self) -> Float64:
        return self.moments_.covariance

    @property
    def eigenvalues_(self) -> Float64:
        values: Float64 = spectrum(self.covariance_)
        return values

    @property
    def shrinkage_(self) -> float:
        moments = self.moments_
        return self._recipe.shrinkage_of(moments)

    @property
    def n_components_(self) -> int:
        return sum(self._recipe.components(self.moments_))

    @property
    def n_samples_seen_(self) -> int:
        return self.moments_.count

    @property
    def n_skipped_(self) -> int:
        return self.moments_.skipped

    def __sklearn_is_fitted__(self) -> bool:
        return "_moments" in vars(self)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        tags.input_tags.allow_nan = self.on_nonfinite == "skip"
        # array_api_support stays off: it would demand an error for arrays of another library than that of `fit`
        return tags

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise sklearn_base.NotFittedError("this Whitening isn't fitted yet: call fit or partial_fit first")

    def _fitted_map(self) -> RowMap:
        """Return the map of the statistics so far, which is computed when it is first needed."""
        self._check_fitted()
        if self._row_map is None:
            self._row_map = self._recipe.row_map(self._moments)
        return self._row_map

    def _rows(self, X: Any, reset: bool) -> tuple[Backend, Array]:  # noqa: N803
        """Return X as rows of the dimensions that the estimator knows, or lets it take those of X."""
        if not _is_of_other_library(X):
            return _as_rows(sklearn_base.validated(self, X, reset))
        backend, rows = _as_rows(X)
        sklearn_base.check_rows(self, rows, reset)
        return backend, rows


def _as_rows(x: Any, name: str = "X") -> tuple[Backend, Array]:
    """Return the backend of an array, and the array; lists become arrays of NumPy."""
    if not _is_of_other_library(x):
        x = np.asarray(x)
    backend = backend_of(x, name)
    if not hasattr(x, "dtype"):  # such as PyTorch's data loaders, which are no arrays
        raise checks.wrong_type(x, name, "an array, or an iterator of arrays, as iter() returns it")
    if getattr(x.dtype, "kind", "f") in NOT_REAL or backend.kernels.xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"{name} has dtype {x.dtype}: real numbers are needed")
    return backend, backend.rows(x, name)


def _is_of_other_library(x: Any) -> bool:
    """Return whether x is an array, but not NumPy's."""
    return not isinstance(x, np.ndarray) and (framework_module(type(x)) is not None or namespace_of(x) is not None)


def _checked_weights(weights: Any, rows: int) -> Float64:
    if math.isnan(rows):
        raise ValueError("sample_weight needs an X of a known number of rows: compute its chunk sizes first")
    backend, given = _as_rows(weights, "sample_weight")
    if backend.kernels.xp.isdtype(given.dtype, "real floating"):
        given = backend.kernels.to_accumulation_dtype(given)  # NumPy has no bfloat16
    checked: Float64 = backend.to_numpy(given).astype(np.float64)
    if checked.shape != (rows,):
        raise ValueError(f"sample_weight has shape {checked.shape}: one weight for each of the {rows} rows is needed")
    if not np.all(np.isfinite(checked) & (checked >= 0)):
        raise ValueError("sample_weight has values below 0, NaN or infinity: weights have to be 0 or more, and finite")
    return checked

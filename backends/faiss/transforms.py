"""A fitted whitening as what FAISS applies to vectors before an index sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import faiss
import numpy as np

from polywhiten import checks
from polywhiten.embeddings.exported_map import ExportedMap, exported_map

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening


def linear_transform(whitening: Whitening) -> faiss.LinearTransform:
    """Return a fitted whitening as a transform of FAISS, which computes what `whitening.transform` computes.

    Parameters
    ----------
    whitening : Whitening
        The fitted estimator of d features, with outputs of k features, and without `normalize=True`.

    Returns
    -------
    faiss.LinearTransform
        The transform, trained: `apply(x)` takes float32 vectors of shape (n, d) and returns (n, k).

    Raises
    ------
    TypeError
        `whitening` isn't a `polywhiten.Whitening`.
    ValueError
        The whitening has `normalize=True`, which one linear transform can't do, or float32 can't hold its map.
    sklearn.exceptions.NotFittedError
        The whitening isn't fitted.

    See Also
    --------
    whitened_index : An index that whitens, with `normalize=True` too.

    Notes
    -----
    The transform computes W x + b, whereas `whitening.transform` computes W (x - m). The bias b is computed in float64
    and rounded once, but the sum W x + b cancels if the mean is far from 0: the page `docs/embeddings-deploy.md` says
    how many digits this costs. FAISS inverts only orthonormal transforms, so `reverse_transform` raises an error; use
    `whitening.inverse_transform`.

    Examples
    --------
    >>> import numpy as np, polywhiten
    >>> from polywhiten.faiss import linear_transform
    >>> x = np.random.default_rng(0).normal(size=(500, 4)).astype("float32")
    >>> whitening = polywhiten.Whitening("pca", n_components=2).fit(x)
    >>> y = linear_transform(whitening).apply(x)
    >>> np.allclose(y, whitening.transform(x), atol=1e-5)
    True
    """
    exported = exported_map(whitening, np.finfo(np.float32))
    if exported.normalize:
        raise ValueError(
            "the whitening has normalize=True, and a faiss.LinearTransform can't bring vectors to unit length: use "
            "polywhiten.faiss.whitened_index, which puts a faiss.NormalizationTransform after it"
        )
    return _linear(exported)


def whitened_index(whitening: Whitening, index: faiss.Index, *, center: bool = False) -> faiss.IndexPreTransform:
    """Return an index that whitens all vectors, those that are added and those that are searched, for another index.

    Parameters
    ----------
    whitening : Whitening
        The fitted estimator of d features, with outputs of k features.
    index : faiss.Index
        The index of k dimensions that gets the whitened vectors. If it has vectors already, these have to be whitened.
    center : bool
        Whether to subtract the mean in a step before the product. Where the mean is far above the deviations, this
        keeps the digits that the product in float32 loses.

    Returns
    -------
    faiss.IndexPreTransform
        The index of d dimensions. It whitens by a `LinearTransform`. With `normalize=True`, a `NormalizationTransform`
        follows, and with `center=True`, a `CenteringTransform` goes before.

    Raises
    ------
    TypeError
        `whitening` isn't a `polywhiten.Whitening`, or `index` isn't a `faiss.Index`.
    ValueError
        The index has another number of dimensions than the whitening has outputs, or float32 can't hold the map.
    sklearn.exceptions.NotFittedError
        The whitening isn't fitted.

    Notes
    -----
    `faiss.write_index` and `read_index` keep everything. `faiss.clone_index`, by which FAISS also copies an index to a
    GPU, can copy a `LinearTransform`, but neither of the other transforms. `reconstruct` of the new index raises an
    error, because FAISS inverts only orthonormal transforms; that of `index` returns whitened vectors.

    Examples
    --------
    >>> import faiss, numpy as np, polywhiten
    >>> from polywhiten.faiss import whitened_index
    >>> x = np.random.default_rng(0).normal(size=(500, 4)).astype("float32")
    >>> whitening = polywhiten.Whitening("pca", n_components=2, normalize=True).fit(x)
    >>> index = whitened_index(whitening, faiss.IndexFlatIP(2))  # products of unit vectors: cosine similarity
    >>> index.add(x)
    >>> similarity, neighbour = index.search(x[:1], 1)
    >>> similarity.round(3)
    array([[1.]], dtype=float32)
    """
    exported = exported_map(whitening, np.finfo(np.float32), centered=center)
    k = len(exported.weight)
    if not isinstance(index, faiss.Index):
        raise checks.wrong_type(index, "index", f"a faiss.Index of {k} dimensions")
    if index.d != k:
        raise ValueError(f"index has {index.d} dimensions, but the whitening's outputs have {k}: make it with {k}")
    whitened = faiss.IndexPreTransform(index)
    if exported.normalize:
        whitened.prepend_transform(faiss.NormalizationTransform(k))
    whitened.prepend_transform(_linear(exported))
    if center:
        whitened.prepend_transform(_centering(exported))
    return whitened


def _linear(exported: ExportedMap) -> faiss.LinearTransform:
    outputs, inputs = exported.weight.shape
    transform = faiss.LinearTransform(inputs, outputs, True)
    faiss.copy_array_to_vector(exported.weight.astype(np.float32).ravel(), transform.A)
    faiss.copy_array_to_vector(exported.bias.astype(np.float32), transform.b)
    transform.is_trained = True
    return transform


def _centering(exported: ExportedMap) -> faiss.CenteringTransform:
    transform = faiss.CenteringTransform(len(exported.center))
    faiss.copy_array_to_vector(exported.center.astype(np.float32), transform.mean)
    transform.is_trained = True
    return transform

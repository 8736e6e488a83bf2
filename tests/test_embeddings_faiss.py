"""`polywhiten.faiss` makes of a fitted whitening a transform with the same outputs, and indexes that apply it."""

import subprocess
import sys

import numpy as np
import pytest
from embedding_exports import assert_refuses_what_is_not_fitted, each_whitening, embeddings, fitted, integers

faiss = pytest.importorskip("faiss")

from polywhiten.faiss import linear_transform, whitened_index  # noqa: E402


def whitened_vectors(index):
    """Return the vectors in the flat index inside a whitened one."""
    return index.index.reconstruct_n(0, index.ntotal)


@each_whitening
def test_outputs_are_those_of_the_estimator(arguments):
    whitening, x = fitted(**arguments), embeddings()
    expected = whitening.transform(x.astype("float64"))
    index = whitened_index(whitening, faiss.IndexFlatL2(expected.shape[1]))
    index.add(x)
    np.testing.assert_allclose(whitened_vectors(index), expected, atol=5e-5)
    if not whitening.normalize:
        np.testing.assert_allclose(linear_transform(whitening).apply(x), expected, atol=5e-5)


def test_a_scale_of_integers_is_inside_the_weight():
    x = integers()
    whitening = fitted(x, scale=0.1)
    for center in (False, True):
        index = whitened_index(whitening, faiss.IndexFlatL2(12), center=center)
        index.add(x.astype("float32"))
        np.testing.assert_allclose(whitened_vectors(index), whitening.transform(x), atol=5e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat"])
def test_the_neighbours_are_those_of_whitened_vectors_in_a_flat_index(normalize, description):
    whitening = fitted(method="pca", n_components=5, normalize=normalize)
    x, queries = embeddings()[:-20], embeddings()[-20:]
    metric = faiss.METRIC_INNER_PRODUCT if normalize else faiss.METRIC_L2
    index = whitened_index(whitening, faiss.index_factory(5, description, metric))
    assert index.d == 12
    index.train(x)
    index.add(x)
    if description != "Flat":
        faiss.extract_index_ivf(index).nprobe = 4  # all of its lists, so that it finds what a flat index finds
    flat = faiss.IndexFlat(5, metric)
    flat.add(whitening.transform(x))
    similarities, neighbours = index.search(queries, 3)
    expected, expected_neighbours = flat.search(whitening.transform(queries), 3)
    np.testing.assert_array_equal(neighbours, expected_neighbours)
    np.testing.assert_allclose(similarities, expected, atol=1e-4)


def test_an_index_can_be_stored():
    index = whitened_index(fitted(normalize=True), faiss.IndexFlatIP(12), center=True)
    index.add(embeddings())
    stored = faiss.deserialize_index(faiss.serialize_index(index))
    np.testing.assert_array_equal(stored.search(embeddings(), 3)[1], index.search(embeddings(), 3)[1])


def test_vectors_that_the_index_has_already_are_kept():
    whitening, flat = fitted(), faiss.IndexFlatL2(12)
    flat.add(whitening.transform(embeddings()))
    index = whitened_index(whitening, flat)
    assert index.ntotal == 400
    assert (index.search(embeddings(), 1)[1][:, 0] == np.arange(400)).all()


def test_with_center_large_means_cost_no_digits():
    x = embeddings(deviations=1000)
    whitening = fitted(x)
    expected = whitening.transform(x.astype("float64"))
    for center, limit in ((False, 1e-2), (True, 2e-5)):
        index = whitened_index(whitening, faiss.IndexFlatL2(12), center=center)
        index.add(x)
        np.testing.assert_allclose(whitened_vectors(index), expected, atol=limit)


def test_only_a_linear_transform_can_be_cloned():
    """If FAISS clones the other transforms some day, the page and the docstring have to say so."""
    faiss.clone_index(whitened_index(fitted(), faiss.IndexFlatL2(12)))
    for whitening, center in ((fitted(normalize=True), False), (fitted(), True)):
        with pytest.raises(RuntimeError, match="clone not supported"):
            faiss.clone_index(whitened_index(whitening, faiss.IndexFlatL2(12), center=center))


def test_wrong_arguments():
    assert_refuses_what_is_not_fitted(linear_transform)
    assert_refuses_what_is_not_fitted(lambda whitening: whitened_index(whitening, faiss.IndexFlatL2(12)))
    with pytest.raises(ValueError, match=r"has normalize=True, .* use polywhiten.faiss.whitened_index"):
        linear_transform(fitted(normalize=True))
    with pytest.raises(ValueError, match="index has 12 dimensions, but the whitening's outputs have 5"):
        whitened_index(fitted(method="pca", n_components=5), faiss.IndexFlatL2(12))
    with pytest.raises(TypeError, match=r"index is a builtins.str: pass a faiss.Index of 12 dimensions"):
        whitened_index(fitted(), "Flat")


@pytest.mark.parametrize("order", [("torch", "faiss"), ("faiss", "torch")])
def test_faiss_and_pytorch_work_in_one_process(order):
    """Each brings its own copy of OpenMP, and some pairs of copies end the process or hang."""
    pytest.importorskip("torch")
    code = f"""if True:
        import {", ".join(order)}, numpy as np, polywhiten.torch, polywhiten.faiss
        x = np.random.default_rng(0).normal(size=(2000, 64)).astype("float32")
        whitening = polywhiten.Whitening().fit(x)
        y = polywhiten.torch.linear(whitening)(torch.from_numpy(x)).numpy()
        index = polywhiten.faiss.whitened_index(whitening, faiss.IndexFlatL2(64))
        index.add(x)
        assert (index.search(x, 1)[1][:, 0] == np.arange(2000)).all()
        assert abs(index.index.reconstruct_n(0, 2000) - y).max() < 1e-5
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr

"""`polywhiten.torch.linear` makes of a fitted whitening a layer with the same outputs."""

import numpy as np
import pytest
from embedding_exports import assert_refuses_what_is_not_fitted, each_whitening, embeddings, fitted, integers
from pages import example

torch = pytest.importorskip("torch")

from polywhiten.torch import UnitLength, linear  # noqa: E402


def outputs(layer, x, dtype=torch.float32):
    return layer(torch.from_numpy(x).to(dtype)).double().numpy()


@each_whitening
def test_outputs_are_those_of_the_estimator(arguments):
    x = embeddings()
    whitening = fitted(x, **arguments)
    expected = whitening.transform(x.astype("float64"))
    np.testing.assert_allclose(outputs(linear(whitening), x), expected, atol=5e-5)
    np.testing.assert_allclose(outputs(linear(whitening, torch.float64), x, torch.float64), expected, atol=1e-11)


def test_the_layer_is_a_plain_frozen_linear_layer():
    whitening = fitted(method="pca", n_components=5)
    layer = linear(whitening)
    assert type(layer) is torch.nn.Linear
    assert (layer.in_features, layer.out_features) == (12, 5)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    copy = torch.nn.Linear(12, 5)
    copy.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(copy(x), layer(x))


def test_groups_give_a_block_diagonal_weight():
    weight = linear(fitted(group_size=5)).weight.numpy()
    is_inside = np.equal.outer(np.arange(12) // 5, np.arange(12) // 5)
    assert (weight[~is_inside] == 0).all()
    assert (weight[is_inside] != 0).all()


def test_a_scale_of_integers_is_inside_the_weight():
    x = integers()
    whitening = fitted(x, scale=0.1)
    np.testing.assert_allclose(outputs(linear(whitening), x), whitening.transform(x), atol=5e-5)


def test_making_a_layer_draws_no_random_numbers():
    whitening = fitted()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    linear(whitening)
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = embeddings(deviations=0)
    whitening = fitted(x, normalize=True)
    rounded = torch.from_numpy(x).to(dtype)
    y = linear(whitening, dtype)(rounded)
    assert y.dtype == dtype
    tolerance = 30 * torch.finfo(dtype).eps
    expected = whitening.transform(rounded.double().numpy())
    np.testing.assert_allclose(y.double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_zeros_stay_zeros_and_others_get_length_1(dtype):
    tiny = torch.finfo(dtype).tiny ** 0.5  # whose square is the smallest normal number
    x = torch.tensor([[0, 0], [3, 4], [4.8e4, 6.4e4], [3 * tiny, 4 * tiny]], dtype=dtype)
    expected = torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]], dtype=dtype)
    torch.testing.assert_close(UnitLength()(x), expected)


def test_gradients_of_rows_of_zeros_are_finite():
    x = torch.zeros(2, 3, requires_grad=True)
    UnitLength()(x).sum().backward()
    assert x.grad.isfinite().all()


def test_the_layers_can_be_exported():
    whitening = fitted(normalize=True)
    layer = linear(whitening)
    x = torch.from_numpy(embeddings())
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:7]), layer(x[:7]))


@pytest.mark.parametrize(("deviations", "limit"), [(10, 1e-4), (1000, 1e-2)])
def test_large_means_cost_as_many_digits_as_the_page_says(deviations, limit):
    x = embeddings(deviations)
    whitening = fitted(x)
    expected = whitening.transform(x.astype("float64"))
    np.testing.assert_allclose(outputs(linear(whitening), x), expected, atol=limit)
    in_float64 = outputs(linear(whitening, torch.float64), x, torch.float64)
    np.testing.assert_allclose(in_float64, expected, atol=limit * 1e-8)


def test_what_is_no_fitted_whitening_is_refused():
    assert_refuses_what_is_not_fitted(linear)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_no_linear_layer_has_is_refused(dtype):
    with pytest.raises(TypeError, match="dtype"):
        linear(fitted(), dtype)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_map_that_the_dtype_cannot_hold_is_refused(factor):
    x = embeddings().astype("float64") * factor
    whitening = fitted(x)
    with pytest.raises(ValueError, match=r"can't be exported in float16, .* Choose another dtype"):
        linear(whitening, torch.float16)
    np.testing.assert_allclose(outputs(linear(whitening), x.astype("float32")), whitening.transform(x), atol=5e-5)


@pytest.mark.filterwarnings("ignore::polywhiten.embeddings.recipe.RankWarning")
def test_constant_data_give_zeros():
    x = np.ones((10, 3), dtype="float32")
    layer = linear(fitted(x, normalize=True))
    assert (outputs(layer, x) == 0).all()


def test_the_example_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = example("embeddings-deploy.md", "PyTorch").run()["layer"]
    assert repr(layer) == (
        "Sequential(\n  (0): Linear(in_features=64, out_features=32, bias=True)\n  (1): UnitLength()\n)"
    )


def test_the_estimator_takes_the_batches_of_a_data_loader_as_an_iterator():
    loader = torch.utils.data.DataLoader(torch.from_numpy(embeddings()), batch_size=100)
    with pytest.raises(TypeError, match=r"X is a torch.*DataLoader: pass an array, or an iterator.*iter"):
        fitted(loader)
    assert fitted(iter(loader)).n_samples_seen_ == len(embeddings())

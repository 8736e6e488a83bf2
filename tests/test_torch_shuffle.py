"""`shuffle=True`: every training step of PyTorch's IterNorm whitens other groups of channels, drawn at random."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from polywhiten.torch import IterNorm  # noqa: E402

CHANNELS, SIZE = 7, 3  # the last group has one channel


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layers(**options):
    """Return a layer that shuffles, and one that doesn't, with the same parameters."""
    options = {"group_size": SIZE, "dtype": torch.float64, **options}
    shuffled, plain = (IterNorm(CHANNELS, shuffle=shuffle, **options) for shuffle in (True, False))
    with torch.no_grad():
        for parameter in shuffled.parameters():
            parameter.uniform_(0.5, 2)
    plain.load_state_dict(shuffled.state_dict())
    return shuffled, plain


def batch(*shape):
    return torch.randn(8, CHANNELS, *shape, dtype=torch.float64) @ torch.randn(*shape[-1:] * 2, dtype=torch.float64)


def drawn_order(seed):
    torch.manual_seed(seed)
    return torch.argsort(torch.rand(CHANNELS))


def test_groups_are_those_of_channels_in_a_random_order():
    """The output is the plain definition for the reordered channels, with each channel back in its place."""
    layer, _ = layers()
    x, order = batch(5), drawn_order(3).numpy()
    weight, bias = (each.detach().numpy() for each in layer.parameters())
    expected = np.empty(x.shape)
    options = {"group_size": SIZE, "method": "newton"}
    expected[:, order] = reference.iter_norm(x.numpy()[:, order], weight[order], bias[order], **options)
    torch.manual_seed(3)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-9)


def test_every_step_has_other_groups_and_a_seed_repeats_them():
    layer, _ = layers()
    x, runs = batch(5), []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append([layer(x).detach() for _ in range(3)])
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    first, second, third = runs[0]
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


@pytest.mark.parametrize("track", ["whitener", "covariance"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_running_averages_and_evaluation_are_those_without_shuffling(track, masked):
    shuffled, plain = layers(track=track)
    mask = [torch.rand(8, 5) < 0.7] * masked
    for _ in range(3):
        x = batch(5)
        assert not torch.allclose(shuffled(x, *mask), plain(x, *mask))
    torch.testing.assert_close(shuffled.state_dict(), plain.state_dict())
    torch.testing.assert_close(shuffled.eval()(x), plain.eval()(x))
    state = torch.get_rng_state()
    torch.testing.assert_close(shuffled(x), shuffled(x), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws nothing"


@pytest.mark.parametrize("options", [{}, {"affine": "coloring"}, {"affine": False}], ids=str)
def test_gradients_are_those_of_finite_differences(options):
    layer, _ = layers(**options)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        torch.manual_seed(5)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    arguments = torch.randn(5, CHANNELS, 2, dtype=torch.float64, requires_grad=True), *layer.parameters()
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


def test_a_mask_leaves_positions_out_and_any_axis_has_the_same_groups():
    layer, _ = layers(axis=-1)
    twin = layers()[0]
    twin.load_state_dict(layer.state_dict())
    x, mask = torch.randn(6, 5, CHANNELS, dtype=torch.float64), torch.rand(6, 5) < 0.7
    for masked, rows in ((mask, x[mask]), (torch.ones_like(mask), x.reshape(-1, CHANNELS))):
        results = []
        for run in (lambda masked=masked: layer(x, masked)[masked], lambda rows=rows: twin(rows)):
            torch.manual_seed(2)
            results.append(run())
        torch.testing.assert_close(*results)


def test_function_transforms():
    layer, xs = layers(track_running_stats=False)[0], torch.randn(3, 8, CHANNELS, dtype=torch.float64)

    def loss(x):
        return layer(x).pow(3).sum()

    gradient = torch.func.grad(loss)
    torch.manual_seed(3)
    batched = torch.vmap(gradient, randomness="same")(xs)
    expected = []
    for x in xs:
        torch.manual_seed(3)
        expected.append(gradient(x))
    torch.testing.assert_close(batched, torch.stack(expected))


def test_memory_format():
    layer, _ = layers()
    x = batch(4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(y.pow(3).sum(), x)[0].is_contiguous(memory_format=torch.channels_last)


def test_a_checkpointed_block_draws_its_groups_again():
    layer, _ = layers()
    x = batch(5).requires_grad_()
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(run(x).pow(3).sum(), x)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("group_size", [1, CHANNELS, 64])
def test_groups_of_one_or_all_channels_need_no_order(group_size):
    layer, plain = layers(group_size=group_size)
    x, state = batch(5), torch.get_rng_state()
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_running_averages_evaluation_whitens_adjacent_channels():
    layer, plain = layers(track_running_stats=False)
    x = batch(5)
    assert not torch.allclose(layer(x), plain(x))
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


@pytest.mark.filterwarnings("error::UserWarning")
def test_compile_whole_graph():
    torch._dynamo.reset()
    layer, _ = layers(iterations=2)
    twin = copy.deepcopy(layer)
    x, results = batch(5), []
    for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), twin):
        torch.manual_seed(6)
        results.append(run(x))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_the_repr_tells():
    assert "shuffle=True" in repr(IterNorm(CHANNELS, shuffle=True))
    assert "shuffle=False" in repr(IterNorm(CHANNELS))

"""`freeze_stats` keeps running averages constant while a network is trained."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from polywhiten.torch import GroupWhitening, IterNorm, freeze_stats  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pretrained():
    """Return a network with running averages, in evaluation mode."""
    model = nn.Sequential(nn.Linear(6, 6), IterNorm(6, group_size=4), nn.ReLU(), nn.Sequential(IterNorm(6)))
    for _ in range(3):
        model(torch.randn(40, 6))
    return model.eval()


def test_training_uses_the_averages_and_learns_the_weights():
    model, x = pretrained(), torch.randn(40, 6)
    expected, old = model(x), copy.deepcopy(model.state_dict())
    assert freeze_stats(model) is model
    model.train()
    assert (model.training, model[1].training, model[3][0].training) == (True, False, False)
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).pow(2).sum().backward()
    optimizer.step()
    new = model.state_dict()
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed == {name for name, _ in model.named_parameters()}


def test_the_gradient_is_that_of_a_constant_map():
    layer, x = freeze_stats(pretrained()[1]), torch.randn(40, 6, requires_grad=True)
    dy = torch.randn(40, 6)
    layer.train()(x).backward(dy)
    matrix = torch.block_diag(layer.running_whitener[0], layer.running_whitener[1, :2, :2])
    torch.testing.assert_close(x.grad, (dy * layer.weight) @ matrix)


@pytest.mark.parametrize("training", [True, False])
def test_it_can_be_undone(training):
    model = pretrained().train(training)
    text = repr(model)
    freeze_stats(model)
    freeze_stats(model, False)
    assert all(module.training is training for module in model.modules())
    assert all(module.training for module in model.train().modules())
    assert repr(model) == text


def test_a_part_of_a_network_can_be_frozen():
    model = pretrained().train()
    freeze_stats(model[3])
    model.eval().train()
    assert (model[1].training, model[3].training, model[3][0].training) == (True, True, False)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies_are_frozen_too(copied):
    model = copied(freeze_stats(pretrained())).train()
    assert not model[1].training
    assert freeze_stats(model, False)[1].training


def test_the_representation_shows_it():
    model = pretrained()
    assert "frozen_stats" not in repr(model)
    assert repr(freeze_stats(model)).count("frozen_stats=True") == 2


def test_a_checkpoint_is_the_same():
    model = pretrained()
    old = model.state_dict()
    assert list(freeze_stats(model).state_dict()) == list(old)
    model.load_state_dict(old)


def test_a_compiled_network_follows():
    model, x = pretrained()[3], torch.randn(40, 6)
    compiled = torch.compile(model, backend="eager").train()
    compiled(x)
    freeze_stats(compiled)
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(compiled.train()(x), model.eval()(x))
    torch.testing.assert_close(model.state_dict(), before)


def test_layers_without_averages_still_whiten_their_batch():
    model = nn.Sequential(IterNorm(6, track_running_stats=False), GroupWhitening(2, 6))
    with pytest.warns(UserWarning, match="nothing to freeze") as warned:
        freeze_stats(model)
    assert warned[0].filename == __file__
    assert model.train()[0].training


def test_batch_normalization_beside_them_is_pointed_out():
    model = nn.Sequential(IterNorm(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.InstanceNorm1d(6))
    with pytest.warns(UserWarning, match="layer '1', the first of 2 such layers,"):
        freeze_stats(model)
    assert not model[0].training


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match=r"model is a builtins\.list"):
        freeze_stats([])
    with pytest.raises(TypeError, match="frozen is 'no'"):
        freeze_stats(nn.Linear(2, 2), "no")

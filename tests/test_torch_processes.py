"""Statistics over the processes of torch.distributed: two processes compute what one does of the joined batch."""

import pytest
from processes import run_processes

torch = pytest.importorskip("torch")

from polywhiten.torch import all_reduce, iter_norm, whitening_stats  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without processes")

# Every process computes its part of the batch with all_reduce, and the joined batch without.
PROCESS = """
import sys
import torch
from torch.testing import assert_close
from polywhiten.torch import all_reduce, iter_norm, whitening_stats

file, rank, number, first = sys.argv[1], *map(int, sys.argv[2:])
torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=number)
part = slice(0, first) if rank == 0 else slice(first, 7)
torch.manual_seed(0)
x, dy, direction = torch.randn(3, 7, 6, 4, dtype=torch.float64) + 1
weight = torch.linspace(1, 2, 6, dtype=torch.float64)


def results(x, dy, direction, **options):
    x, gamma = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = iter_norm(x, weight=gamma, group_size=4, **options)
    dx, dweight = torch.autograd.grad((y**3 * dy).sum(), (x, gamma), create_graph=True)
    (second,) = torch.autograd.grad((dx * direction).sum(), x)
    stats = whitening_stats(x, group_size=4, **options)
    (of_stats,) = torch.autograd.grad(stats.mean.sum() + stats.whitener.pow(3).sum(), x)
    transformed = torch.func.grad(lambda x: (iter_norm(x, group_size=4, **options) ** 3).sum())(x.detach())
    return (y, dx, second, transformed), dweight, stats, of_stats


(joined, joined_dweight, joined_stats, joined_of_stats) = results(x, dy, direction)
shared, dweight, stats, of_stats = results(x[part], dy[part], direction[part], all_reduce=all_reduce())
for found, wanted in zip(shared, joined, strict=True):
    assert_close(found, wanted[part])
torch.distributed.all_reduce(dweight := dweight.detach().clone())
assert_close(dweight, joined_dweight)
assert_close(tuple(stats), tuple(joined_stats))
assert_close(of_stats, 2 * joined_of_stats[part])  # the loss is in both processes

everyone, alone = torch.distributed.group.WORLD, torch.distributed.new_group([0])
assert all_reduce(everyone) == all_reduce() == all_reduce(None)
assert hash(all_reduce(everyone)) == hash(all_reduce())
if rank == 0:
    assert all_reduce(alone) == all_reduce(alone) != all_reduce()
    assert_close(iter_norm(x, all_reduce=all_reduce(alone)), iter_norm(x))
else:
    try:
        all_reduce(alone)
    except ValueError as error:
        assert "not in process_group" in str(error)
    else:
        raise AssertionError("a sum over other processes")
values = torch.arange(12.0).reshape(4, 3).t()
total = all_reduce()(values)
assert_close(total, 2 * values)
assert_close(torch.vmap(all_reduce(), in_dims=1)(values), 2 * values.t())
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("first", [3, 7], ids=["unequal parts", "an empty part"])
def test_two_processes_are_one_batch(first, tmp_path):
    statuses, errors = run_processes(PROCESS, 2, tmp_path / "store", first)
    assert statuses == [0, 0], errors


@pytest.mark.parametrize("function", [iter_norm, whitening_stats])
def test_without_processes_an_error_says_what_to_call(function):
    with pytest.raises(ValueError, match=r"no process group.* call torch.distributed.init_process_group first"):
        function(torch.randn(8, 6), all_reduce=all_reduce())


def test_functions_for_the_default_group_are_equal():
    assert all_reduce() == all_reduce(None)
    assert hash(all_reduce()) == hash(all_reduce(None))

"""Training with several processes that share statistics equals training with one process on the joined batch."""

import copy
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from processes import TIMEOUT, run_processes

torch = pytest.importorskip("torch")

from polywhiten.analysis import InfeasibleWarning  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm, convert_sync  # noqa: E402
from polywhiten.torch.norm_layers import NormAct  # noqa: E402

ROOT = Path(__file__).parent.parent
needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without processes")

# What all scripts begin with: a network, its copy for one process, and how often processes exchange.
COMMON = """
import copy, os, pickle, sys, time, warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close
from polywhiten.analysis import InfeasibleWarning
from polywhiten.torch import IterNorm, convert, convert_sync

store, rank, number = sys.argv[1], *map(int, sys.argv[2:4])
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
network = nn.Sequential(  # made before the default group; 10 channels are groups of 4, 4 and 2
    nn.Conv2d(3, 10, 3),
    IterNorm(10, group_size=4, process_group="world"),
    nn.ReLU(inplace=True),
    nn.Conv2d(10, 6, 1),
    IterNorm(6, track="covariance", momentum=None, process_group="world"),
    nn.Flatten(),
    nn.Linear(36, 2),
)
one = convert_sync(copy.deepcopy(network))
for layer in (one[1], one[4]):
    layer.process_group = None  # this copy is one process on the joined batch
dist.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=number, timeout=timedelta(seconds=300)
)
sum_over_processes, exchanges = dist.all_reduce, []


def counted(*args, **kwargs):
    exchanges.append(None)
    return sum_over_processes(*args, **kwargs)


dist.all_reduce = counted


def gradients(model):
    return [getattr(parameter.grad, "full_tensor", lambda: parameter.grad)() for parameter in model.parameters()]


def raises(error, function, *args):
    try:
        function(*args)
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error}")
"""

SHARES = """
sizes = [int(size) for size in sys.argv[4].split(",")]
x, dy = torch.randn(sum(sizes), 3, 5, 4) + 3, torch.randn(sum(sizes), 2)


def step(model, part):
    inputs = x[part].clone().requires_grad_()
    model.zero_grad()
    y = model(inputs)
    forward = len(exchanges)
    (y.square() * dy[part]).sum().backward()
    return y.detach(), inputs.grad, gradients(model), forward


joined_y, joined_dx, joined_gradients, _ = step(one, slice(None))
assert not exchanges
part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
y, dx, own_gradients, forward = step(network, part)
assert (forward, len(exchanges)) == (2, 4), "each of two layers exchanges once forward and once backward"
for gradient in own_gradients:
    sum_over_processes(gradient)
differences = {
    "outputs": [y - joined_y[part]],
    "gradient of the input": [dx - joined_dx[part]],
    "gradients of parameters": [own - joined for own, joined in zip(own_gradients, joined_gradients, strict=True)],
    "running statistics": [
        own.double() - joined for own, joined in zip(network.buffers(), one.buffers(), strict=True)
    ],
}
for name, values in differences.items():
    worst = max(float(value.abs().max()) for value in values if value.numel()) if values[0].numel() else 0.0
    assert worst < 1e-6, (name, worst)
    if "--report" in sys.argv:
        print(f"{number} processes, {name}: {worst:.1e}")
exchanges.clear()
network.eval()(x[part])
assert not exchanges, "evaluation exchanges nothing"
"""

WRAPPERS = """
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

x, labels = torch.randn(2, 12, 3, 5, 4) + 3, torch.arange(24).reshape(2, 12) % 2
part = slice(6 * rank, 6 * rank + 6)


def loss(model, batch, part=slice(None)):
    return nn.functional.cross_entropy(model(x[batch, part]), labels[batch, part])


for batch in (0, 1):
    loss(one, batch).backward()  # gradients of two batches, accumulated
after_two = [*gradients(one)]

# DDP averages the gradients, so means over equal shares give those of one process, without any factor
for options in ({}, {"find_unused_parameters": True}):
    model = DistributedDataParallel(copy.deepcopy(network), **options)
    with model.no_sync():
        loss(model, 0, part).backward()
    loss(model, 1, part).backward()
    assert_close(gradients(model), after_two)
    assert_close([*model.module.buffers()], [*one.buffers()])

# unequal shares need each loss times the number of processes and the share's part of the batch
model, share = DistributedDataParallel(copy.deepcopy(network)), [slice(0, 9), slice(9, 12)][rank]
for batch in (0, 1):
    (loss(model, batch, share) * number * [9, 3][rank] / 12).backward()
assert_close(gradients(model), after_two)

model = copy.deepcopy(network)
for module in (model[0], model[1], model[4], model):
    fully_shard(module)
for batch in (0, 1):
    loss(model, batch, part).backward()
assert_close(gradients(model), after_two)

model = copy.deepcopy(network)
dist.all_reduce = sum_over_processes  # which the compiler knows
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
for batch in (0, 1):
    (loss(compiled, batch, part) / number).backward()
for gradient in gradients(model):
    sum_over_processes(gradient)
assert_close(gradients(model), after_two)
assert_close([*model.buffers()], [*one.buffers()])

# without a group, DDP treats the running averages as those of batch normalization: rank 0's count
for layer in (nn.BatchNorm1d(4), IterNorm(4)):
    model, rows = DistributedDataParallel(layer), torch.randn(2, 20, 4)
    model(rows[rank])
    own = layer.running_mean.clone()
    dist.broadcast(first := own.clone(), 0)
    assert torch.equal(own, first) == (rank == 0)
    model.eval()(rows[0])
    assert torch.equal(layer.running_mean, first), "an evaluation takes rank 0's averages"
    model.train()(rows[rank])
    assert_close(layer.running_mean, torch.lerp(first, rows[rank].mean(0), 0.1))
"""

LAYERS = """
def layer(**options):
    return IterNorm(4, group_size=2, process_group="world", **options)


rows = torch.randn(number, 6, 4)

# a batch that isn't finite in one process is left out, or raises an error, in all
damaged = rows[rank] if rank == 0 else rows[rank] * float("nan")
skipping = layer(momentum=None)
assert skipping(damaged).isnan().all()
skipping(rows[rank])
assert skipping.num_batches_tracked == 1
assert_close(skipping.running_mean, rows.mean((0, 1)))
assert "here or in another process" in raises(ValueError, layer(on_nonfinite="raise"), damaged)
raising = layer(on_nonfinite="raise")
assert_close(raising(rows[rank]), skipping(rows[rank]))

# evaluation exchanges nothing, without averages either
before = len(exchanges)
assert_close(layer(track_running_stats=False).eval()(rows[rank]), IterNorm(4, group_size=2)(rows[rank]))
assert len(exchanges) == before

# if nobody has a sample, nothing changes
assert skipping(rows[rank, :0]).shape == (0, 4)
assert skipping.num_batches_tracked == 2

# the samples of all processes count: whitening 4 channels takes 4 samples, and there are 2 here
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", InfeasibleWarning)
    IterNorm(4, process_group="world")(rows[rank, :2])
    assert not caught
    IterNorm(4)(rows[rank, :2])
    assert len(caught) == 1
assert_close(layer()(rows[rank, :1]), IterNorm(4, group_size=2)(rows[:, 0])[rank : rank + 1])  # one sample in each

# what a layer's other arguments compute is computed of the joined batch
sequences, mask = torch.randn(number, 5, 7, 6), torch.rand(number, 5, 7) > 0.4
for options, masked in (({}, True), ({"affine": "coloring"}, False)):
    shared = IterNorm(6, group_size=4, axis=-1, process_group="world", **options)
    alone = copy.deepcopy(shared)
    alone.process_group = None
    inputs, joined = sequences[rank].clone().requires_grad_(), sequences.flatten(0, 1).requires_grad_()
    y = shared(inputs, mask[rank] if masked else None)
    y.pow(3).sum().backward()
    joined_y = alone(joined, mask.flatten(0, 1) if masked else None)
    joined_y.pow(3).sum().backward()
    assert_close(y, joined_y.unflatten(0, (number, 5))[rank])
    assert_close(inputs.grad, joined.grad.unflatten(0, (number, 5))[rank])
    assert_close([*shared.buffers()], [*alone.buffers()])

# processes with generators in different states still draw the same groups, within which the joined batch is white
torch.manual_seed(rank)
y = IterNorm(6, group_size=3, axis=-1, process_group="world", shuffle=True, method="eigh")(sequences[rank]).detach()
sum_over_processes(products := torch.einsum("nlc,nld->cd", y, y) / sequences[..., 0].numel())
assert (products.abs() < 1e-3).sum() == 2 * 6, "each channel is uncorrelated with the two others of its group"

# groups: members alone may have them, copies share them, and a group of one process exchanges nothing
both, alone = dist.new_group([0, 1]), dist.new_group([0])
shared = convert_sync(IterNorm(4), both)
assert shared.process_group is both is copy.deepcopy(shared).process_group
assert "set process_group of its layers" in raises(TypeError, pickle.dumps, shared)
assert_close(shared(rows[rank]), IterNorm(4)(rows.flatten(0, 1)).unflatten(0, (2, 6))[rank])
before = len(exchanges)
if rank == 0:
    assert_close(convert_sync(IterNorm(4), alone)(rows[0]), IterNorm(4)(rows[0]))
    assert len(exchanges) == before
else:
    assert "not in process_group" in raises(ValueError, convert_sync, shared, alone)
    assert shared.process_group is both
old = nn.Sequential(nn.SyncBatchNorm(4, process_group=both), nn.SyncBatchNorm(4))
assert [new.process_group for new in convert(old, "iter_norm")] == [both, "world"]
"""

DEATH = """
layer, rows = IterNorm(4), torch.randn(6, 4)
hanging = dist.new_group(timeout=timedelta(seconds=3))
layer.process_group = hanging
layer(rows)
if rank == 1:
    time.sleep(10)
    os._exit(0)  # without a word to the others
start = time.monotonic()
raises(RuntimeError, layer, rows)  # the other process is alive and doesn't call the layer
assert 2 < time.monotonic() - start < 9
layer.process_group = "world"
raises(RuntimeError, layer, rows)  # the other process has ended
assert time.monotonic() - start < 60, "far less than the timeout of this group"
os._exit(0)
"""


@needs_processes
@pytest.mark.parametrize(
    ("script", "sizes"),
    [(SHARES, "5,0,3,1"), (SHARES + LAYERS + DEATH, "6,3"), (WRAPPERS, "6,6")],
    ids=["four processes", "two processes", "two processes with wrappers"],
)
def test_processes_that_share_a_batch_are_one_process_on_it(script, sizes, tmp_path):
    number = len(sizes.split(","))
    statuses, errors = run_processes(COMMON + script, number, tmp_path / "store", sizes)
    assert statuses == [0] * number, errors


def test_without_processes_a_layer_whitens_its_own_batch():
    x = torch.randn(8, 6)
    torch.testing.assert_close(IterNorm(6, process_group="world")(x), IterNorm(6)(x))
    assert IterNorm(6, process_group="world")(x[:0]).shape == (0, 6)
    with pytest.raises(ValueError, match="1 sample"):
        IterNorm(6, process_group="world")(x[:1])


@pytest.mark.parametrize("process_group", [None, "world"])
def test_copies_and_what_is_saved(process_group):
    layer = IterNorm(6, process_group=process_group)
    assert copy.deepcopy(layer).process_group == process_group
    assert pickle.loads(pickle.dumps(layer)).process_group == process_group
    assert list(layer.state_dict()) == list(IterNorm(6).state_dict())
    assert ("process_group='world'" in repr(layer)) == (process_group is not None)


@pytest.mark.parametrize(
    ("process_group", "error", "message"),
    [
        ("all", ValueError, "process_group='all' is unknown: pass a ProcessGroup, or 'world'"),
        (3, TypeError, "process_group is a builtins.int: pass a torch.distributed.ProcessGroup, or 'world'"),
    ],
)
def test_wrong_groups(process_group, error, message):
    network = torch.nn.Sequential(IterNorm(6, process_group="world"))
    with pytest.raises(error, match=message):
        IterNorm(6, process_group=process_group)
    with pytest.raises(error, match=message):
        convert_sync(network, process_group)
    assert network[0].process_group == "world"


def test_convert_sync_changes_iter_norm_alone():
    network = torch.nn.Sequential(
        IterNorm(6),
        NormAct(IterNorm(6), torch.nn.Identity(), torch.nn.ReLU()),
        torch.nn.BatchNorm2d(6),
        GroupWhitening(3, 6),
        torch.nn.ReLU(),
    )
    layers = [*network.modules()]
    assert convert_sync(network) is network
    assert [*network.modules()] == layers
    assert [module.process_group for module in layers if isinstance(module, IterNorm)] == ["world"] * 2
    convert_sync(network[0], "world")
    with pytest.warns(UserWarning, match="ReLU has no IterNorm layer"):
        convert_sync(network[4])
    with pytest.raises(TypeError, match=r"model is a builtins\.str"):
        convert_sync("network")


def test_a_warning_without_processes_counts_the_own_samples():
    with pytest.warns(InfeasibleWarning, match="there are 2"):
        IterNorm(6, process_group="world")(torch.randn(2, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IterNorm(6, process_group="world").eval()(torch.randn(2, 6))


@needs_processes
def test_the_page_s_commands_print_the_same_numbers():
    pytest.importorskip("sklearn")
    page = (ROOT / "docs" / "many-workers.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(.*?)```", page, re.S)[1]
    modules = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
    outputs = []
    for line in block.splitlines():
        program, *arguments = line.split()
        full = [sys.executable, *modules[program], *arguments, "--epochs", "1"]
        done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert re.fullmatch(r"epoch 1  training loss [\d.]+  test loss [\d.]+  test accuracy [\d.]+\n", outputs[0])

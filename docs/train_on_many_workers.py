"""Train the demo's network in any number of processes that share every batch.

Every number of processes prints what one process prints. See docs/many-workers.md.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from polywhiten.cli.demo.data import load_digits
from polywhiten.cli.demo.training import MOMENTUM, Settings, batches, learning_rate, steps_per_epoch
from polywhiten.torch import convert_sync
from polywhiten.torch.demo import network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    options = parser.parse_args()
    settings = Settings(options.epochs, options.batch_size, lr=0.05, seed=0, device="cpu")

    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")  # "nccl" on GPUs
    is_shared = dist.is_initialized()
    rank, number = (dist.get_rank(), dist.get_world_size()) if is_shared else (0, 1)
    if options.batch_size % number:
        parser.error(f"--batch-size={options.batch_size} has no equal parts for {number} processes")

    data = load_digits()
    x_train, x_test = (torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (data.x_train, data.x_test))
    y_train, y_test = torch.from_numpy(data.y_train), torch.from_numpy(data.y_test)
    # float64, because training enlarges rounding errors from step to step
    model = convert_sync(network("iternorm", data, settings.seed).double())
    if is_shared:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=MOMENTUM)
    step, steps = 0, settings.epochs * steps_per_epoch(data, settings)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        losses = []
        for batch in batches(data, settings, epoch):
            part = torch.from_numpy(batch).tensor_split(number)[rank]  # of this process
            optimizer.param_groups[0]["lr"] = learning_rate(settings, step / steps)
            loss = cross_entropy(model(x_train[part]), y_train[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        loss = _mean_over_processes(torch.stack(losses).mean())
        model.eval()
        with torch.no_grad():
            scores = model(x_test)
        accuracy = (scores.argmax(1) == y_test).double().mean()
        if rank == 0:
            print(f"epoch {epoch}  training loss {loss:.8f}  test loss {cross_entropy(scores, y_test):.8f}", end="  ")
            print(f"test accuracy {accuracy:.4f}")
    if is_shared:
        dist.destroy_process_group()


def _mean_over_processes(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


if __name__ == "__main__":
    main()

"""Train a network with IterNorm by Hugging Face's accelerate.

Needs a checkout with `pip install -c constraints.txt ".[demo,torch]" accelerate`.
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from polywhiten.cli.demo.data import load_digits
from polywhiten.torch import IterNorm, update_stats


def network() -> nn.Module:
    """Return a network with three layers of IterNorm, for images of digits."""
    layers: list[nn.Module] = []
    for old, new in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(old, new, 3, padding=1, bias=False), IterNorm(new, group_size=16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    data = load_digits()
    training, test = (
        TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2).float(), torch.from_numpy(y).long())
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    )
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train_loader = DataLoader(training, batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, train_loader, test_loader = accelerator.prepare(
        model, optimizer, train_loader, DataLoader(test, batch_size=256)
    )

    def train(epochs: int) -> None:
        for _ in range(epochs):
            model.train()
            for x, y in train_loader:
                with accelerator.accumulate(model):
                    accelerator.backward(cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()

    def show_accuracy(when: str) -> None:
        model.eval()
        correct = []
        for x, y in test_loader:
            with torch.no_grad():
                correct.append(accelerator.gather_for_metrics((model(x).argmax(1) == y).float()))
        accelerator.print(f"{when:40} accuracy {torch.cat(correct).mean():.4f}")

    train(4)
    show_accuracy("after training")
    update_stats(model, train_loader)
    show_accuracy("after update_stats")

    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        train(1)
        accelerator.load_state(folder)
    show_accuracy("the saved state again")
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""Train a network with IterNorm by Lightning, and average its weights.

Needs a checkout with `pip install -c constraints.txt ".[demo,torch]" lightning`.
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from polywhiten.cli.demo.data import load_digits
from polywhiten.torch import IterNorm, update_stats


class Digits(lightning.LightningModule):
    """A network with three layers of IterNorm, for images of digits."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        for old, new in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(old, new, 3, padding=1, bias=False), IterNorm(new, group_size=16), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def main() -> None:
    lightning.seed_everything(0)
    data = load_digits()
    training, test = (
        TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2).float(), torch.from_numpy(y).long())
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    )
    train_loader = DataLoader(training, batch_size=64, shuffle=True, drop_last=True)
    test_loader = DataLoader(test, batch_size=256)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def accuracy(when: str) -> None:
        # by a trainer of its own, because one that averages weights evaluates its own average
        (result,) = lightning.Trainer(enable_model_summary=False, **options).validate(model, test_loader, verbose=False)
        print(f"{when:40} accuracy {result['accuracy']:.4f}")

    model = Digits()
    average = WeightAveraging(avg_fn=get_ema_avg_fn(0.98), use_buffers=False)
    trainer = lightning.Trainer(max_epochs=3, callbacks=[average], enable_model_summary=False, **options)
    trainer.fit(model, train_loader)
    accuracy("after training, averaged weights")  # their running averages are still those of the first step
    update_stats(model, train_loader)
    accuracy("after update_stats")


if __name__ == "__main__":
    main()

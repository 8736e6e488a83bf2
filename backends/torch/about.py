"""What polywhiten says of PyTorch; see `polywhiten.cli.about.About`."""

MODULE = "torch"
TITLE = "PyTorch"
EXTRAS = ("torch",)


def devices() -> list[str]:
    import torch

    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    return ["cpu", *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]

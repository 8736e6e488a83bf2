"""Compares float32 errors of IterNorm with those of the paper's recurrence: `python benchmarks/accuracy.py`.

`--device cuda` runs it on a GPU, `--gpu-launches joined` with the other structure of its kernels.

Prints two Markdown tables. An error is the largest difference from float64, relative to the largest value there. The
recurrence too is compared with polywhiten in float64, because the recurrence is inaccurate even in float64.
"""

from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch

import polywhiten as pw
from polywhiten.gpu_launches import CHOICES, DEFAULT, use_gpu_launches

CHANNELS, SAMPLES = 64, 4096


def paper(x: torch.Tensor, iterations: int) -> torch.Tensor:
    """Whiten the rows x (samples, channels) as in the paper (equations 6 and 7)."""
    centred = x - x.mean(0)
    cov = centred.T @ centred / len(x) + 1e-5 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    trace = cov.trace()
    p = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        p = (3 * p - p @ p @ p @ (cov / trace)) / 2
    return centred @ p / trace.sqrt()


def values(
    normalize: Callable[..., torch.Tensor], x: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the gradient of x, converted to float64."""
    x = x.clone().requires_grad_()
    y = normalize(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach().double(), dx.double()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{((actual - expected).abs().max() / expected.abs().max()).item():.1e}"


def covariance_of(x: torch.Tensor) -> torch.Tensor:
    """Return the covariance of the channels of x (N, C, H, W), in float64."""
    return torch.cov(x.double().transpose(0, 1).flatten(1), correction=0)


def iterations_table(generator: torch.Generator, device: str) -> None:
    print("| condition | T | forward | backward | paper's forward | paper's backward |")
    print("| --- | --- | --- | --- | --- | --- |")
    for condition in (1e2, 1e4, 1e6):
        q, _ = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64))
        spread = torch.logspace(0, -np.log10(condition) / 2, CHANNELS, dtype=torch.float64)
        x = 10 * torch.randn(SAMPLES, CHANNELS, generator=generator, dtype=torch.float64) * spread @ q
        x = x.float().double().to(device)  # so that both precisions get the same numbers
        dy = torch.randn(SAMPLES, CHANNELS, generator=generator, dtype=torch.float64).to(device)
        for iterations in (5, 10, 20, 50, 100):
            stable = partial(pw.iter_norm, iterations=iterations)
            exact = values(stable, x, dy)
            single = values(stable, x.float(), dy.float())
            plain = values(partial(paper, iterations=iterations), x.float(), dy.float())
            errors = [relative(a, e) for pair in (single, plain) for a, e in zip(pair, exact, strict=True)]
            print(f"| {condition:.0e} | {iterations} | {' | '.join(errors)} |")


def mean_table(generator: torch.Generator, device: str) -> None:
    print("| mean | covariance | whitened covariance, eigh |")
    print("| --- | --- | --- |")
    for mean in (0.0, 1e3, 1e4):
        x = (torch.randn(32, CHANNELS, 14, 14, generator=generator) + mean).to(device)
        covariance = pw.whitening_stats(x).covariance[0].double()
        white = covariance_of(pw.iter_norm(x, method="eigh", eps=0.0))
        eye = torch.eye(CHANNELS, dtype=torch.float64, device=device)
        print(f"| {mean:.0e} | {relative(covariance, covariance_of(x))} | {relative(white, eye)} |")


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--gpu-launches", "structure", type=click.Choice(CHOICES), default=DEFAULT, show_default=True, help="On CUDA."
)
def main(device: str, structure: str) -> None:
    """Print the errors of polywhiten's float32 on a device."""
    generator = torch.Generator().manual_seed(0)  # of the CPU, so that all devices get the same numbers
    with use_gpu_launches(structure):
        iterations_table(generator, device)
        print()
        mean_table(generator, device)


if __name__ == "__main__":
    main()

"""Stochastic normalization disturbance (SND): how much a sample's output depends on the batch that it comes in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from array_api_compat import device

from polywhiten._types import Array, Namespace
from polywhiten.checks import check_array, check_integer, check_positive
from polywhiten.dispatch import backend_of


class Disturbance(NamedTuple):
    """SND as measured.

    Attributes
    ----------
    value : float
        Mean over the samples.
    standard_error : float
        Standard error of that mean; NaN for a single sample.
    """

    value: float
    standard_error: float


def stochastic_normalization_disturbance(
    normalize: Callable[[Array], Array], sample_batches: Iterable[Iterable[Array]]
) -> Disturbance:
    r"""Measure how far a sample's normalized output is from its mean over random batches, per element.

    For a sample x in batches B_1 ... B_s, all of which hold it, and an output of d elements,

    .. math:: \Delta(x) = \tfrac{1}{s d} \sum_i \lVert y_i - \bar y \rVert, \quad y_i = F(B_i)_x, \quad
              \bar y = \tfrac{1}{s} \sum_i y_i

    Parameters
    ----------
    normalize : callable
        F, which maps a batch (m, ...) to an array of the same shape. Call a layer without recording gradients:
        otherwise its outputs keep alive what a gradient would need.
    sample_batches : iterable of iterables of arrays
        For every sample its batches, with the sample at index 0, as the function `sample_batches` draws them.

    Returns
    -------
    Disturbance
        Mean and standard error over the samples; exactly 0 if F normalizes every sample by itself.

    Notes
    -----
    The mean over s batches is closer to their outputs than the mean over all batches would be, so the value is too
    small by a factor of about sqrt(1 - 1 / s): by 1 % for 50 batches.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> from polywhiten.analysis import sample_batches, stochastic_normalization_disturbance
    >>> x = np.random.default_rng(0).normal(size=(500, 16))
    >>> batches = sample_batches(x, 32, num_samples=10, num_batches=10)
    >>> for size in (1, 16):  # batch normalization, and whitening of all channels
    ...     snd = stochastic_normalization_disturbance(lambda x: pw.iter_norm(x, group_size=size), batches)
    ...     print(f"{snd.value:.3f} +- {snd.standard_error:.3f}")
    0.048 +- 0.001
    0.066 +- 0.001
    >>> stochastic_normalization_disturbance(lambda x: pw.group_whiten(x, num_groups=4), batches)
    Disturbance(value=0.0, standard_error=0.0)
    """
    distances = [_mean_distance(normalize, batches) for batches in sample_batches]
    if not distances:
        raise ValueError("sample_batches has no samples: at least 1 is needed")
    error = float(np.std(distances, ddof=1)) / math.sqrt(len(distances)) if len(distances) > 1 else math.nan
    return Disturbance(float(np.mean(distances)), error)


def _mean_distance(normalize: Callable[[Array], Array], batches: Iterable[Array]) -> float:
    """Return one sample's mean distance, divided by the number of its elements."""
    outputs = []
    for batch in batches:
        y = normalize(batch)
        backend = backend_of(y, "normalize(batch)")
        kernels, y = backend.kernels, backend.tensor(y, "normalize(batch)")
        check_array(kernels.xp, y, "normalize(batch)")
        if tuple(y.shape) != tuple(batch.shape):
            raise ValueError(
                f"normalize(batch) has shape {tuple(y.shape)}: it must have the batch's, {tuple(batch.shape)}"
            )
        outputs.append(kernels.xp.reshape(kernels.to_accumulation_dtype(y[:1, ...]), (1, -1)))
    if len(outputs) < 2:
        raise ValueError(f"sample_batches gives fewer than 2 batches for a sample: {len(outputs)}")
    xp = kernels.xp
    # relative to the first one, so that equal outputs are exactly at their mean
    off = xp.concat([output - outputs[0] for output in outputs])
    count, size = map(int, off.shape)
    off = off - xp.sum(off, axis=0) / count
    return float(xp.sum(xp.sqrt(xp.sum(off * off, axis=1)))) / (count * size)


def sample_batches(
    data: Array, batch_size: int, *, num_samples: int = 50, num_batches: int = 50, seed: int = 0
) -> Iterable[Iterable[Array]]:
    """Draw random batches for `stochastic_normalization_disturbance`: several for each of some samples.

    Parameters
    ----------
    data : array, shape (N, ...)
        Real floating point.
    batch_size : int
        2 to N.
    num_samples : int
        Number of samples to draw from the data, N at most.
    num_batches : int
        Number of batches to draw for every sample.
    seed : int
        0 or more. The same data, sizes and seed give the same batches, in every library.

    Returns
    -------
    iterable of iterables of arrays, shape (batch_size, ...)
        For every sample its batches, each with the sample at index 0 and others drawn without replacement. Batches are
        made on demand, and again in every iteration.

    Examples
    --------
    >>> import numpy as np
    >>> from polywhiten.analysis import sample_batches
    >>> data = np.arange(6.0)[:, None]
    >>> for batches in sample_batches(data, 3, num_samples=2, num_batches=2):
    ...     print([batch[:, 0].astype(int).tolist() for batch in batches])
    [[4, 1, 5], [4, 1, 5]]
    [[3, 2, 5], [3, 4, 5]]
    """
    backend = backend_of(data, "data")
    data = backend.tensor(data, "data")
    check_array(backend.kernels.xp, data, "data")
    total = data.shape[0] if data.ndim else 0
    for name, value, least in (("batch_size", batch_size, 2), ("num_samples", num_samples, 1)):
        if not least <= check_integer(name, value) <= total:
            raise ValueError(f"{name}={value} must be from {least} to the number of samples in data, {total}")
    check_positive("num_batches", num_batches)
    if check_integer("seed", seed) < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    chosen = np.random.default_rng(seed).choice(total, num_samples, replace=False)
    return [_Batches(backend.kernels.xp, data, batch_size, num_batches, seed, int(sample)) for sample in chosen]


@dataclass(frozen=True)
class _Batches:
    """The batches of one sample, drawn alike in every iteration."""

    xp: Namespace
    data: Array
    batch_size: int
    number: int
    seed: int
    sample: int

    def __iter__(self) -> Iterator[Array]:
        random = np.random.default_rng((self.seed, self.sample))
        for _ in range(self.number):
            others = random.choice(self.data.shape[0] - 1, self.batch_size - 1, replace=False, shuffle=False)
            indices = np.concatenate([[self.sample], others + (others >= self.sample)])
            yield self.xp.take(self.data, self.xp.asarray(indices, device=device(self.data)), axis=0)

"""The definitions of the two papers in NumPy float64, block by block: slow, simple, and independent of polywhiten."""

import numpy as np

from polywhiten.solvers.minimax import minimax_steps


def inverse_sqrt(cov, method="eigh", iterations=None):
    """Return the method's approximation of S^(-1/2), by applying its scalar recurrence to every eigenvalue."""
    values, vectors = np.linalg.eigh(cov)
    if method == "eigh":
        roots = values**-0.5
    elif method == "newton":
        scale, p = values.sum(), np.ones_like(values)
        for _ in range(iterations or 5):
            p = (3 * p - p**3 * values / scale) / 2
        roots = p / np.sqrt(scale)
    else:
        scale = np.sqrt(np.sum(values**2))
        x = np.sqrt(values / scale)
        sigma = x.copy()
        for a, b, c in (*minimax_steps(iterations or 5), (15 / 8, -10 / 8, 3 / 8)):  # the last step is flat at 1
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        roots = sigma / x / np.sqrt(scale)
    return vectors * roots @ vectors.T


def whiten(x, eps=1e-5, relative_eps=False, **solver):
    """Return W (x - mean) for a block x of shape (d, M)."""
    centred = x - x.mean(axis=1, keepdims=True)
    cov = centred @ centred.T / x.shape[1]
    added = eps * np.trace(cov) / len(cov) if relative_eps else eps
    return inverse_sqrt(cov + added * np.eye(len(x)), **solver) @ centred


def iter_norm(x, weight=None, bias=None, group_size=64, axis=1, **options):
    """Whiten groups of channels over the batch."""
    rows = np.moveaxis(np.float64(x), axis, 0)
    shape, rows = rows.shape, rows.reshape(len(rows), -1)
    y = np.concatenate([whiten(rows[i : i + group_size], **options) for i in range(0, len(rows), group_size)])
    return _affine(np.moveaxis(y.reshape(shape), 0, axis), weight, bias, axis)


def group_whiten(x, weight=None, bias=None, num_groups=32, axis=1, **options):
    """Whiten the channel groups of each sample."""
    moved = np.moveaxis(np.float64(x), axis, 1)
    y = np.stack([whiten(sample.reshape(num_groups, -1), **options).reshape(sample.shape) for sample in moved])
    return _affine(np.moveaxis(y, 1, axis), weight, bias, axis)


def _affine(y, weight, bias, axis):
    shape = [-1 if i == axis % y.ndim else 1 for i in range(y.ndim)]
    y = y if weight is None else y * np.reshape(weight, shape)
    return y if bias is None else y + np.reshape(bias, shape)

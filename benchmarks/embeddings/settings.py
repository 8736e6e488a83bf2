"""The transforms that are compared: settings of `polywhiten.Whitening`, and simpler transforms beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

import polywhiten
from embeddings.scores import unit

RAW = "raw"


class Transform(Protocol):
    """What the tasks need of an estimator."""

    def fit(self, x: np.ndarray) -> Any: ...

    def transform(self, x: np.ndarray) -> np.ndarray: ...


class Raw:
    """Leaves vectors as they are."""

    def fit(self, x: np.ndarray) -> Self:
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x


class Centred(Raw):
    """Subtracts the mean."""

    def fit(self, x: np.ndarray) -> Self:
        self.mean = x.mean(0, dtype=np.float64).astype(x.dtype)
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x - self.mean


class Standardized(Centred):
    """Gives each coordinate mean 0 and variance 1; constant ones become 0."""

    def fit(self, x: np.ndarray) -> Self:
        super().fit(x)
        self.deviation = x.std(0)
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        varied = self.deviation > 1e-6 * self.deviation.max()
        return np.where(varied, super().transform(x) / np.where(varied, self.deviation, 1), 0)


class Projected(Centred):
    """Keeps the principal components from `first` up to `last`, without scaling them.

    `Projected(0, k)` is PCA. `Projected(D, None)` is "all but the top", the postprocessing of Mu and Viswanath (2018).
    """

    def __init__(self, first: int, last: int | None) -> None:
        self._kept = slice(first, last)

    def fit(self, x: np.ndarray) -> Self:
        super().fit(x)
        _, vectors = np.linalg.eigh(np.cov(x, rowvar=False, dtype=np.float64))
        self.components = vectors[:, ::-1][:, self._kept].astype(x.dtype)
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return super().transform(x) @ self.components


@dataclass(frozen=True)
class Setting:
    """A transform of d-dimensional vectors, and whether they have unit length before and after it.

    Attributes
    ----------
    name : str
    make : callable
        Returns the transform for a dimension d.
    normalize : bool
        Divide each result by its length, so that inner products are cosines.
    normalize_input : bool
        The same before the transform is fitted and applied.
    """

    name: str
    make: Callable[[int], Transform]
    normalize: bool = True
    normalize_input: bool = False

    def fit_transform(self, fitted_on: np.ndarray, others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Fit on one array, and return the others transformed."""
        first = unit if self.normalize_input else np.asarray
        transform = self.make(fitted_on.shape[1])
        transform.fit(first(fitted_on))
        last = unit if self.normalize else np.asarray
        return {name: last(transform.transform(first(x))) for name, x in others.items()}


@dataclass(frozen=True)
class Options:
    """Arguments of `polywhiten.Whitening`; `divisor` asks for d / divisor components."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    divisor: int | None = None

    def __call__(self, d: int) -> Transform:
        components = {} if self.divisor is None else {"n_components": d // self.divisor}
        return polywhiten.Whitening(**self.arguments, **components)


def whitening(name: str, divisor: int | None = None, **arguments: Any) -> Setting:
    return Setting(name, Options(arguments, divisor))


def unnormalized(setting: Setting) -> Setting:
    return Setting(f"{setting.name}, any length", setting.make, normalize=False)


def unit_input(setting: Setting) -> Setting:
    return Setting(f"{setting.name}, unit input", setting.make, normalize_input=True)


DIVISORS = (2, 4, 8)
GROUP_SIZES = (2, 16)  # fractions of d: groups of d / 2 and d / 16
EPS = (0.01, 0.1, 1.0, 10.0)

BASELINES = [
    Setting(RAW, lambda d: Raw()),
    Setting("centred", lambda d: Centred()),
    Setting("standardized", lambda d: Standardized()),
    Setting("all but the top", lambda d: Projected(max(1, d // 100), None)),
    *(Setting(f"pca without whitening, d/{n}", lambda d, n=n: Projected(0, d // n)) for n in DIVISORS),
]
ZCA = whitening("zca")
LEDOIT_WOLF = whitening("zca, ledoit_wolf", shrinkage="ledoit_wolf")
SOFT = {eps: whitening(f"zca, eps={eps:g}", eps=eps) for eps in EPS}
REDUCED = [whitening(f"pca d/{n}", n, method="pca") for n in DIVISORS]
FULL = [whitening(method, method=method) for method in ("pca", "cholesky", "zca_cor")]
NEWTON = [whitening(f"newton, T={t}", method="newton", iterations=t) for t in (3, 5)]
GROUPED = [
    Setting(f"zca, groups of d/{n}", lambda d, n=n: polywhiten.Whitening(group_size=d // n)) for n in GROUP_SIZES
]
COMPARED = [
    *BASELINES,
    ZCA,
    *FULL,
    *REDUCED,
    *NEWTON,
    LEDOIT_WOLF,
    *SOFT.values(),
    *GROUPED,
    unit_input(ZCA),
    unnormalized(BASELINES[0]),
    unnormalized(ZCA),
    unnormalized(REDUCED[1]),
]

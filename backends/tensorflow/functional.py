"""The functions of `polywhiten` as TensorFlow's users call them: with NumPy's arrays, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tensorflow as tf

import polywhiten
from polywhiten.numpy_inputs import taking_numpy

R = TypeVar("R")


def _of_tensorflow(function: Callable[..., R]) -> Callable[..., R]:
    return taking_numpy(function, tf.convert_to_tensor)


apply_whitening = _of_tensorflow(polywhiten.apply_whitening)
group_whiten = _of_tensorflow(polywhiten.group_whiten)
group_whiten_vjp = _of_tensorflow(polywhiten.group_whiten_vjp)
inverse_sqrt = _of_tensorflow(polywhiten.inverse_sqrt)
iter_norm = _of_tensorflow(polywhiten.iter_norm)
iter_norm_vjp = _of_tensorflow(polywhiten.iter_norm_vjp)
whitening_stats = _of_tensorflow(polywhiten.whitening_stats)

"""TensorFlow: the functions of `polywhiten` as differentiable operations, eagerly, in graphs and under XLA."""

import polywhiten
from polywhiten import *  # noqa: F403
from polywhiten.tensorflow.backend import BACKEND
from polywhiten.tensorflow.replicas import sum_over_replicas

__all__ = ["BACKEND", "sum_over_replicas"]
__all__ += polywhiten.__all__

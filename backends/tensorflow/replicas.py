"""Sum statistics over the replicas of a `tf.distribute` strategy."""

import tensorflow as tf

from polywhiten.tensorflow.namespace import Tensor


def sum_over_replicas(x: Tensor) -> Tensor:
    """Return the sum of x over the replicas of the strategy that runs this; x itself without a strategy.

    Parameters
    ----------
    x : tf.Tensor
        Of the same shape in every replica.

    Returns
    -------
    tf.Tensor
        Shape and dtype of x.

    Examples
    --------
    As `all_reduce=` of `polywhiten.iter_norm`, in a function that a strategy runs: the statistics are then those of the
    replicas' joined batch.

    >>> import polywhiten as pw
    >>> import tensorflow as tf
    >>> from polywhiten.tensorflow import sum_over_replicas
    >>> strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    >>> x = tf.random.normal((8, 4))
    >>> strategy.run(pw.iter_norm, (x,), {"all_reduce": sum_over_replicas}).shape
    TensorShape([8, 4])
    """
    context = tf.distribute.get_replica_context()
    return x if context is None else context.all_reduce(tf.distribute.ReduceOp.SUM, x)

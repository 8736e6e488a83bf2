"""The experiments, in the order in which each round of a plan makes their runs."""

from study import conditioning, disturbance, groups, resnet, steps, training

EXPERIMENTS = [module.EXPERIMENT for module in (training, resnet, groups, disturbance, conditioning, steps)]
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}

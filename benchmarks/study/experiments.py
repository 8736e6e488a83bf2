"""The experiments, in the order in which each round of a plan makes their runs."""

from study import conditioning, disturbance, evaluation, groups, resnet, steps, training

MODULES = (training, evaluation, resnet, groups, disturbance, conditioning, steps)
EXPERIMENTS = [module.EXPERIMENT for module in MODULES]
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}

"""Sums over the processes of `torch.distributed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polywhiten import checks
from polywhiten._types import AllReduce

WORLD = "world"


def all_reduce(process_group: dist.ProcessGroup | None = None) -> AllReduce:
    """Return a function that sums a tensor over the processes of a group, for `all_reduce=`.

    Statistics are then those of the joined batch of all these processes.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, optional
        Processes that share a batch. The default is the default group at the time of the sum, which may be initialized
        later.

    Returns
    -------
    callable
        Returns the sum as a new tensor. Functions for the same group are equal and have the same hash.

    Raises
    ------
    ValueError
        This process isn't in the group; also raised by the function, if the default group isn't initialized.

    Notes
    -----
    All processes of the group have to make the same calls with `all_reduce`, forward and backward, in the same order,
    because each call waits for the others. A process may pass an empty batch.

    The gradient of x is that of the sum of all processes' losses. The gradients of weight and bias are those of the
    process' own samples; `DistributedDataParallel` combines them like those of all other parameters. The sum itself is
    differentiable any number of times, as second derivatives and the gradients of `whitening_stats` need it, and works
    in the transforms of `torch.func`.

    Examples
    --------
    In a script that `torchrun` starts in several processes::

        torch.distributed.init_process_group()
        y = polywhiten.torch.iter_norm(x, all_reduce=polywhiten.torch.all_reduce())
    """
    return SumOverProcesses.of(process_group)


@dataclass(frozen=True)
class SumOverProcesses:
    """The sum over the processes of a group, or of the default group at the time of the sum."""

    process_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, process_group: Any) -> SumOverProcesses:
        """Return the sum over a group; None and "world" are the default group.

        A ValueError says that this process isn't in the group, or that it is another string; a TypeError that it is
        something else.
        """
        if process_group is None or (isinstance(process_group, str) and process_group == WORLD):
            return cls(None)
        if isinstance(process_group, str):
            raise ValueError(f"process_group={process_group!r} is unknown: pass a ProcessGroup, or {WORLD!r} for all")
        if dist.is_available() and process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in process_group: pass it only in the group's processes")
        if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            raise checks.wrong_type(process_group, "process_group", f"a torch.distributed.ProcessGroup, or {WORLD!r}")
        return cls(None if process_group is dist.group.WORLD else process_group)

    @property
    def number(self) -> int:
        """Number of the group's processes; 1 if `torch.distributed` isn't initialized."""
        return dist.get_world_size(self.process_group) if _is_initialized() else 1

    @property
    def index(self) -> int:
        """Number of this process within the group, from 0."""
        _check_initialized()
        return dist.get_rank(self.process_group)

    def __call__(self, x: Tensor) -> Tensor:
        _check_initialized()
        total: Tensor = _SumOverProcesses.apply(x, self.process_group)
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> SumOverProcesses:
        """Return the same sum: copies of a layer share their group."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.process_group is not None:
            raise TypeError(
                "a ProcessGroup can't be pickled: save the model's state_dict, or set process_group of its layers to "
                f"{WORLD!r} or None before"
            )
        return SumOverProcesses, (None,)


class _SumOverProcesses(torch.autograd.Function):
    """The sum as a new tensor; its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(x: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.process_group = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(gradient, ctx.process_group), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, process_group: Any) -> tuple[Tensor, int]:
        return _SumOverProcesses.apply(x, process_group), in_dims[0]


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _check_initialized() -> None:
    if not _is_initialized():
        raise ValueError(
            "torch.distributed has no process group, so all_reduce has no processes to sum over: "
            "call torch.distributed.init_process_group first"
        )

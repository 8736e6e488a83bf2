"""One warning per network about all of its infeasible layers.

A layer doesn't know its network. When a layer is infeasible for the first time, its network is looked up on the call
stack: the outermost object that the framework is calling and that contains the layer. The warning is issued once all
layers of the network have run, or one of them runs again, and says how many are infeasible. After it the network's
layers are silent. Only names are stored in between, so that a network can be deleted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from polywhiten.feasibility import InfeasibleWarning


@dataclass(frozen=True)
class Framework:
    """How to recognise a framework's networks."""

    kind: type  # the class of networks and of all their parts
    name: Callable[[Any], str]  # returns a network's name for the warning
    layers: Callable[[Any], Mapping[str, Any]]  # returns the layers in an object, or itself, by names for the warning


@dataclass
class Survey:
    """What is known about the layers of one network, by their names."""

    network: str | None  # None for a layer that is called by itself
    waiting: set[str] = field(default_factory=set)  # layers still to run in this pass
    seen: set[str] = field(default_factory=set)  # layers that have run since the survey began
    objections: dict[str, str] = field(default_factory=dict)
    warned: bool = False


class Notice:
    """A layer's part in its network's warning, stored as the layer's attribute `_notice`."""

    def __init__(self) -> None:
        self.runs = 0
        self.name = ""
        self.survey: Survey | None = None

    def run(self, framework: Framework, layer: Any, objection: str | None) -> None:
        """Record a pass through the layer in training, with what is infeasible in it, and warn if it is time to."""
        self.runs += 1
        if self.survey is None:
            if objection is None:
                return
            self.survey = _begin(framework, layer)
        survey = self.survey
        if survey.warned:
            return
        if self.name in survey.seen:  # the next pass has begun: layers that still wait don't take part in every one
            survey.waiting.clear()
        survey.seen.add(self.name)
        survey.waiting.discard(self.name)
        if objection is not None:
            survey.objections.setdefault(self.name, objection)
        if not survey.waiting:
            survey.warned = True
            _warn(framework, layer, survey)


def _begin(framework: Framework, layer: Any) -> Survey:
    """Start a survey of the network that the layer runs in."""
    network, _ = _outermost(framework, layer)
    survey = Survey(None if network is layer else framework.name(network))
    for name, other in framework.layers(network).items():
        notice = other._notice
        if notice.survey is None:
            notice.name, notice.survey = name, survey
            if notice.runs < layer._notice.runs:  # it hasn't run in this pass yet
                survey.waiting.add(name)
    return survey


def _warn(framework: Framework, layer: Any, survey: Survey) -> None:
    (subject, objection), number = next(iter(survey.objections.items())), len(survey.objections)
    if survey.network is not None:
        count = f", the first of {number} infeasible layers" if number > 1 else ""
        subject = f"{subject}{count} of {survey.network}"
    _, level = _outermost(framework, layer)
    warnings.warn(InfeasibleWarning(f"{subject}: {objection}", survey.objections), stacklevel=level)


def _outermost(framework: Framework, layer: Any) -> tuple[Any, int]:
    """Return the network that the layer runs in, and the caller's `stacklevel` for a warning where it is called."""
    package = framework.kind.__module__.partition(".")[0]
    outermost, level = layer, 1
    inside = False  # whether the last frame belongs to the framework and works for the outermost object
    frame: FrameType | None = sys._getframe(1)
    number = 1
    while frame is not None:
        # f_locals keeps a frame's objects alive: it isn't touched in the user's functions, which may run for long
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module == package:
            owner = frame.f_locals.get("self")
            if isinstance(owner, framework.kind) and (
                owner is outermost or any(other is layer for other in framework.layers(owner).values())
            ):
                outermost, inside = owner, True
        elif inside and module != "polywhiten":  # a user's call, and not that of a layer of ours
            level, inside = number, False
        frame, number = frame.f_back, number + 1
    return outermost, level

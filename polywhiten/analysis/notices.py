"""One warning a network, of all of its layers that are infeasible.

A layer doesn't know its network. Where one finds itself infeasible for the first time, the network is the outermost
object that the framework is calling and that has the layer. Its other layers go on collecting, until all of them have
run or one runs again; then the warning says how many there are, and no layer of the network warns any more. What is
kept in between are names, so that a network can be deleted.
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
    """How a framework's networks are known.

    Attributes
    ----------
    kind : type
        Of networks and their parts.
    name : callable
        Of such an object, what a warning calls it.
    layers : callable
        Of such an object, the layers in it that take part, by what a warning calls them. A layer has itself.
    """

    kind: type
    name: Callable[[Any], str]
    layers: Callable[[Any], Mapping[str, Any]]


@dataclass
class Survey:
    """What is infeasible in a network, by its layers' names."""

    network: str | None  # None for a layer by itself
    waiting: set[str] = field(default_factory=set)  # which had not run yet when the first was found, and still haven't
    seen: set[str] = field(default_factory=set)  # which have run since
    found: dict[str, str] = field(default_factory=dict)
    said: bool = False


class Notice:
    """A layer's part in its network's warning: the layer's attribute `_notice`."""

    def __init__(self) -> None:
        self.runs = 0
        self.name = ""
        self.survey: Survey | None = None

    def run(self, framework: Framework, layer: Any, objection: str | None) -> None:
        """To be called in every pass that layers take part in, with what the layer finds infeasible in it."""
        self.runs += 1
        if self.survey is None:
            if objection is None:
                return
            self.survey = _begin(framework, layer)
        survey = self.survey
        if survey.said:
            return
        if self.name in survey.seen:  # another pass: what still waits isn't part of every one
            survey.waiting.clear()
        survey.seen.add(self.name)
        survey.waiting.discard(self.name)
        if objection is not None:
            survey.found.setdefault(self.name, objection)
        if not survey.waiting:
            survey.said = True
            _warn(framework, layer, survey)


def _begin(framework: Framework, layer: Any) -> Survey:
    """A survey of the network that the layer runs in."""
    network, _ = _outermost(framework, layer)
    survey = Survey(None if network is layer else framework.name(network))
    for name, other in framework.layers(network).items():
        notice = other._notice
        if notice.survey is None:
            notice.name, notice.survey = name, survey
            if notice.runs < layer._notice.runs:  # not yet in this pass
                survey.waiting.add(name)
    return survey


def _warn(framework: Framework, layer: Any, survey: Survey) -> None:
    first, objection = next(iter(survey.found.items()))
    number = len(survey.found)
    subject = first
    if survey.network is not None:
        subject += (
            f", the first of {number} infeasible layers of {survey.network}" if number > 1 else f" of {survey.network}"
        )
    _, level = _outermost(framework, layer)
    warnings.warn(InfeasibleWarning(f"{subject}: {objection}", survey.found), stacklevel=level)


def _outermost(framework: Framework, layer: Any) -> tuple[Any, int]:
    """What the layer runs in, and the `stacklevel` by which the function that asks warns where that is called."""
    package = framework.kind.__module__.partition(".")[0]
    outermost, level = layer, 1
    within = False  # whether the last frame was one of the framework's, on the outermost object's behalf
    frame: FrameType | None = sys._getframe(1)
    number = 1
    while frame is not None:
        # what is looked at in a frame stays alive as long as it: not in the user's own functions, which may be long
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module == package:
            owner = frame.f_locals.get("self")
            if isinstance(owner, framework.kind) and (
                owner is outermost or any(each is layer for each in framework.layers(owner).values())
            ):
                outermost, within = owner, True
        elif within and module != "polywhiten":  # a layer's own call is none of the user's
            level, within = number, False
        frame, number = frame.f_back, number + 1
    return outermost, level

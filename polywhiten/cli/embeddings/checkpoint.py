"""The state of an interrupted `polywhiten fit`, from which the same command goes on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polywhiten.cli.streams import complain
from polywhiten.embeddings.files import Source
from polywhiten.embeddings.recipe import LEDOIT_WOLF
from polywhiten.embeddings.replacement import replacing
from polywhiten.moments import Moments

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening


class Checkpoint:
    """A file with the moments of the first rows, beside the output.

    It is used only if the statistics of the other rows can be added to it: if the inputs have the same paths, sizes and
    times of change, and parameters that moments depend on are the same. Others, such as the method, may differ.

    Parameters
    ----------
    out : Path
        The output of `fit`.
    source : Source
        The inputs.
    whitening : polywhiten.Whitening
        The estimator, of which the parameters alone are used.
    seconds : float
        How often `save_at_times` writes the file.
    """

    def __init__(self, out: Path, source: Source, whitening: Whitening, seconds: float) -> None:
        self.path = out.with_name(f"{out.name}.checkpoint")
        needs_fourth = whitening.shrinkage == LEDOIT_WOLF
        self._key = json.dumps([_state_of(source), whitening.scale, needs_fourth], sort_keys=True)
        self._may_skip = whitening.on_nonfinite == "skip"
        self._seconds, self._last = seconds, time.monotonic()

    def load(self) -> tuple[Moments | None, str]:
        """Return the moments, or None if there are none that fit, and a sentence about it, which may be empty."""
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                fields = json.loads(str(file["json"]))
                if fields["key"] != self._key or (fields["numbers"]["skipped"] and not self._may_skip):
                    return None, f"starting again: {self.path} is of other inputs or parameters"
                moments = Moments.of_parts(file, fields["numbers"])
                rows = moments.count + moments.skipped
                return moments, f"going on after {rows:,} rows, from {self.path}"
        except FileNotFoundError:
            return None, ""
        except Exception as error:  # a damaged file raises nearly anything
            return None, f"starting again: {self.path} can't be read ({error})"

    def save(self, moments: Moments) -> None:
        """Write the file, which has all of its content whenever the process is killed."""
        arrays, numbers = moments.parts()
        fields = {"key": self._key, "numbers": numbers}
        with replacing(self.path) as part, part.open("wb") as stream:
            np.savez(stream, allow_pickle=False, json=np.array(json.dumps(fields)), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        self._last = time.monotonic()

    def save_at_times(self, moments: Moments) -> None:
        """Write the file if the last time is long enough ago; if it can't be written, warn and go on."""
        if time.monotonic() - self._last < self._seconds:
            return
        try:
            self.save(moments)
        except OSError as error:
            complain(f"warning: {self.path} can't be written ({error.strerror or error})")
            self._last = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _state_of(source: Source) -> list[Any]:
    """Return what tells whether files have changed, without reading them."""
    state = []
    for file in source.files:
        status = file.path.stat()
        state.append([str(file.path.resolve()), file.key, file.column, status.st_size, status.st_mtime_ns])
    return state

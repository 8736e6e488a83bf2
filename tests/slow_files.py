"""Files that are read slowly, and note who reads them. Processes that tests start import this module by its name."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from polywhiten.embeddings.files import FileRows


@dataclass(frozen=True)
class SlowFile(FileRows):
    """A file of which one piece is read; it notes which process does that, and takes its time."""

    number: int
    log: Path

    def open(self):
        with self.log.open("a") as log:
            log.write(f"{self.number} {os.getpid()}\n")
        time.sleep(0.03)
        return super().open()


def readers(log):
    """Return the pieces that were read, in their order, each with the process that read it."""
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []

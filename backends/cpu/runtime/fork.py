"""Whether this process was forked: a forked process can't use its parent's threads, and would wait for them forever."""

import os
import sys
import threading
from pathlib import Path

_STAT = Path("/proc/self/stat")  # Linux's description of this process
_PF_FORKNOEXEC = 0x40  # Linux's flag of a process that was forked and hasn't started another program since


def _was_forked() -> bool:
    """Return whether this process was forked, as far as that can be found out afterwards.

    In doubt it was, which costs only speed. A process that starts Python anew, as those that multiprocessing spawns,
    wasn't.
    """
    if not hasattr(os, "fork"):
        return False
    try:
        flags = int(_STAT.read_bytes().rpartition(b")")[2].split()[6])
    except (OSError, IndexError, ValueError):
        flags = 0
    if flags:
        return bool(flags & _PF_FORKNOEXEC)
    if sys.platform == "linux" and threading.main_thread().native_id != os.getpid():  # Python still has the parent's id
        return True
    process = sys.modules.get("multiprocessing.process")  # has been imported if multiprocessing started this process
    return (
        process is not None
        and process.parent_process() is not None
        and "--multiprocessing-fork" not in sys.orig_argv  # in spite of its name, the argument of spawned processes
    )


FORKED: list[bool] = [True] * _was_forked()  # a list that isn't empty in a forked process
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: FORKED.append(True))

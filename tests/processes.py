"""Run a script in several processes, which find each other by a file."""

import subprocess
import sys

TIMEOUT = 600  # seconds; on a busy machine, importing and compiling takes minutes


def run_processes(script, number, store, *arguments):
    """Run a script with the arguments (store, rank, number, *arguments) in each process; return their exit statuses.

    The statuses are all 0, or else the second result has the ends of what the processes wrote to stderr.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", script, str(store), str(rank), str(number), *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(error[-3000:] for error in errors)

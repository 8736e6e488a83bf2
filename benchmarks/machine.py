"""Describes the machine that runs the measurements."""

import os
import platform
import re
from pathlib import Path


def description() -> str:
    """Return the processor model and the numbers of cores and threads."""
    model, cores = platform.processor() or platform.machine(), None
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        text = listing.read_text(encoding="utf-8")
        names = re.findall(r"^model name\s*: (.+)$", text, re.M)
        model = names[0] if names else model
        cores = len(set(re.findall(r"^physical id\s*: (\d+)$.*?^core id\s*: (\d+)$", text, re.M | re.S)))
    threads = f"{os.cpu_count()} threads"
    return f"{model}, {cores} cores, {threads}" if cores else f"{model}, {threads}"

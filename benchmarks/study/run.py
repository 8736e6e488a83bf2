"""Runs the study's experiments and its report: `python benchmarks/study/run.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from study.commands import main

if __name__ == "__main__":
    main()

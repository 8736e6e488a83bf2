"""Measures whitening on real embeddings and draws the page's results: `python benchmarks/embeddings/run.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from embeddings.commands import main

if __name__ == "__main__":
    main()

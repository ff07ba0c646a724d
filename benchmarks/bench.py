"""`modernbert bench` from a checkout: python benchmarks/bench.py --preset cpu

Results go to `benchmarks/results/` unless `--out` says otherwise.
"""

import sys
from pathlib import Path

from modernbert.benchmark.command import bench

if __name__ == "__main__":
    try:
        bench.main(default_map={"out": Path(__file__).parent / "results"})
    except ValueError as error:
        sys.exit(f"error: {error}")

"""Draw the plots of saved results again: python benchmarks/plot.py results/x.json ..."""

import json
import sys
from pathlib import Path

from modernbert.benchmark.plots import draw

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        path = Path(name)
        for drawn in draw(json.loads(path.read_text()), path.parent, path.stem):
            print(drawn)

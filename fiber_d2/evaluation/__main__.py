"""``python -m fiber_d2.evaluation score PREDICTIONS.json --dataset NAME``; see ``--help``."""

import sys

from fiber_d2.evaluation.score import main

if __name__ == "__main__":
    sys.exit(main())

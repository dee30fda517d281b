"""``python -m fiber_d2``: the same as ``fiber-d2``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

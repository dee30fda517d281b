#!/usr/bin/env python
"""Check a data set before it costs a training run: all of what is wrong with it.

    python datasets/validate.py --dataset NAME [NAME ...]
    python datasets/validate.py --coco-json F [F ...] --image-root D [--kind refexp]

`--help` tells more; `fiber-d2 validate` is the same, see fiber_d2/commands/validate.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fiber_d2.commands.validate import main, prepare_process  # noqa: E402

if __name__ == "__main__":
    prepare_process()
    sys.exit(main())

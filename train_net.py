#!/usr/bin/env python
"""Train or evaluate FIBER: ``train_net.py --config-file configs/quickstart.py``.

Takes the options of Detectron2's scripts, a LazyConfig (``.py``) or a CfgNode (``.yaml``), and
``key=value`` overrides; ``--help`` lists them. Installed as ``fiber-d2-train`` too.
"""

import os

# torch's C++ warnings, pages of them when a connection ends, would hide the one message about it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from fiber_d2.engine.main import main  # noqa: E402 - it imports torch

if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Train or evaluate FIBER: ``train_net.py --config-file configs/quickstart.py``.

Takes the options of Detectron2's scripts, a LazyConfig (``.py``) or a CfgNode (``.yaml``), and
``key=value`` overrides; ``--help`` lists them. Installed as ``fiber-d2-train`` too.
"""

from fiber_d2.engine.main import main

if __name__ == "__main__":
    main()

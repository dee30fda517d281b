"""Translate yaml files of the original FIBER into a recipe of ours and what to change in it.

    python tools/convert_config.py BASE.yaml [TASK.yaml ...] [--eval-only] [--output RECIPE.py]
                                   [KEY VALUE ...]

`--help` tells more; `fiber-d2 convert config` is the same, see fiber_d2/original_config/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fiber_d2.original_config import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

"""Convert checkpoints between the original FIBER's names and ours, or make one to start from.

    python tools/convert_checkpoint.py from-fiber ORIGINAL.pth OUT.pth [--ema]
    python tools/convert_checkpoint.py to-fiber OURS.pth OUT.pth [--like ORIGINAL.pth]
    python tools/convert_checkpoint.py initialize OUT.pth --config-file C [--swin F] ...

`--help` tells more; `fiber-d2 convert` is the same, see fiber_d2/commands/convert.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fiber_d2.commands.convert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

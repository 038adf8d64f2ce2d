"""``python -m minirlhf`` is the command ``minirlhf``."""

from __future__ import annotations

import sys

from minirlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())

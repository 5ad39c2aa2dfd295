"""``python -m bhfast.diff``."""

import sys

from bhfast.diff.program import main

if __name__ == "__main__":
    sys.exit(main())

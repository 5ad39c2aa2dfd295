"""``python -m bhfast.watch``."""

import sys

from bhfast.watch.program import main

if __name__ == "__main__":
    sys.exit(main())

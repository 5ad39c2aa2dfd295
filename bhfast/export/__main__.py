"""``python -m bhfast.export``."""

import sys

from bhfast.export.program import main

if __name__ == "__main__":
    sys.exit(main())

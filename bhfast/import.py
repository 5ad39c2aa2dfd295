"""``python -m bhfast.import``: see :mod:`bhfast.foreign.importing`."""

import sys

from bhfast.foreign.importing import main as main

if __name__ == "__main__":
    sys.exit(main())

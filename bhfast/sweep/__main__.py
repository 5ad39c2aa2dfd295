"""``python -m bhfast.sweep``."""

import sys

from bhfast.sweep.program import main

sys.exit(main())

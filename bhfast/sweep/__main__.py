"""``python -m bhfast.sweep``."""

import sys

from bhfast.sweep import main

sys.exit(main())

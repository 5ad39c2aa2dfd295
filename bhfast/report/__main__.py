"""``python -m bhfast.report``."""

import sys

from bhfast.report import main

sys.exit(main())

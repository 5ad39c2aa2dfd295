"""``python -m bhfast.report``."""

import sys

from bhfast.report.program import main

sys.exit(main())

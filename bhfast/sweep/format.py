"""What identifies a ``sweep.json``."""

from __future__ import annotations

FORMAT = {"format": "bhfast-sweep", "version": 1}

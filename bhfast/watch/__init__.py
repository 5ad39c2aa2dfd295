"""A page that follows a run while it goes on."""

from bhfast.watch.program import main as main

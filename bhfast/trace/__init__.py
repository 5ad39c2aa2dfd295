"""The trace file: its format, its checksums, and how it is read."""

from bhfast.trace.reader import Trace as Trace
from bhfast.trace.reader import TraceTensor as TraceTensor
from bhfast.trace.sharded import open_trace as open_trace

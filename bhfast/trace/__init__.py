"""The trace file: its format, its checksums, and reading it."""

from bhfast.trace.reader import Trace as Trace
from bhfast.trace.sharded import open_trace as open_trace
from bhfast.trace.tensors import ShardedTensor as ShardedTensor
from bhfast.trace.tensors import TraceTensor as TraceTensor

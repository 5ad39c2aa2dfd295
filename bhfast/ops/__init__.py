"""The operations of bhfast: clipping, Adam and recording, with the same bits on every device."""

from bhfast.ops.extension import backend as backend

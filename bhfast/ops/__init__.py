"""The operations of bhfast: clipping, Adam and recording, bit for bit the same on every device."""

from bhfast.ops.extension import backend as backend

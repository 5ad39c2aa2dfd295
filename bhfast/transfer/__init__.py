"""Transfers records from a device to host memory."""

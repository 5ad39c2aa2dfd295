"""Records on their way from a device to the host's memory."""

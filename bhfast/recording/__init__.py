"""The recorder: what of which parameters is recorded, by which process, and when."""

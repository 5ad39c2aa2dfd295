"""The recorder: which parameters it records, which of their tensors, in which process, and when."""

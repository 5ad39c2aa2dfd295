"""Ways to run training steps. Each engine is one file; all have the members of :class:`bhfast.engines.job.Engine`."""

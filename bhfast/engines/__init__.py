"""Ways to run training steps, one file each. Every engine follows :class:`bhfast.engines.base.Engine`."""

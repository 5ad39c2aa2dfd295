"""Where a recording grows, in memory or in the file, and how it becomes a trace."""

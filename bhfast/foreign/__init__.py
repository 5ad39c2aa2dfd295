"""Recordings of other programs: made into traces, and replayed with settings that the user gives."""

"""The files of a run, and the only code that knows their paths within the run directory."""

"""What a run leaves on disk, and the only code that knows where in a run directory each thing lies."""

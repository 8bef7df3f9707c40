"""What people look at: the page with its charts, the terminal, progress, and the list of runs."""

"""Everything decided before anything runs. Pure data, made by pure functions."""

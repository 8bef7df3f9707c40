"""Cells as Slurm's jobs."""

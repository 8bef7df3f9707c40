"""What ranks execute: `python -m runner.workloads CELL_DIR` under any engine.

A rank reads `job.json` in the cell's directory, measures, and appends events to `rank<K>.jsonl` in the same
directory. These files are the whole interface between Shakedown and its ranks, so a workload that is started by
hand with plain `torchrun` writes the same file.
"""

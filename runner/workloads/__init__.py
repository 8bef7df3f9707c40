"""What ranks execute: `python -m runner.workloads CELL_DIR` under any engine.

A rank reads `job.json` in the cell's directory, measures, and appends events to `rank<K>.jsonl`
beside it. Nothing else passes between the product and its ranks, so a workload can be started by
hand with plain `torchrun` and gives the same file.
"""

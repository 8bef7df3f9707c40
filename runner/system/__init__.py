"""What everything else stands on: processes, files, locks, places, node sets. It knows nothing of benchmarks."""

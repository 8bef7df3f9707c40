"""The foundation of all other packages: processes, files, locks, places, node sets. Independent of benchmarks."""

"""Other engines as arms of the benchmarks, each run by the Python of its own environment."""

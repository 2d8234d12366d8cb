"""Benchmarks, one a file: each has ``run(quick) -> dict`` of JSON values and a docstring that says what it measures."""

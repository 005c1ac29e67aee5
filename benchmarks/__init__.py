"""Measurements: each module ends with one JSON line; run them as `python -m benchmarks.NAME`."""

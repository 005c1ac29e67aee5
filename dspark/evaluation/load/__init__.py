"""Load tests: schedules side by side at several concurrencies.

A model, a workload and concurrencies enter; throughput, per-user speed and their frontiers leave.
Called by `dspark bench` and the benchmarks.
"""

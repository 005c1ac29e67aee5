"""Evaluation of drafters: accepted length, calibration, load, pair checks, losslessness proof.

A target with a drafter and prompts enter; records, figures, reports and findings leave. Called by
`dspark eval`, `calibrate`, `bench`, `check` and `prove`, by the benchmarks and by `dspark fit`.
"""

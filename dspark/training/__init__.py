"""Training of drafters and of small targets.

A recipe enters; a checkpoint of the trained model, checkpoints of the run, a log and measurements
leave. Called by `dspark train`, `dspark data cache` and `dspark fit`.
"""

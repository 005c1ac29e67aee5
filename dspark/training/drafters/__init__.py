"""Drafter training: samples with target features, new drafters and their objectives.

A drafter recipe and a frozen target enter; batches of samples with features (computed online, read
from a cache, or both), the loss of each step, accepted lengths on held-out prompts and the exported
drafter leave. Called by `training.run`, and by `dspark data cache`, which builds the cache.
"""

"""Samples and target features of a training run: computed online, read from a cache, or both.

A recipe and its frozen target enter; batches of samples with their features leave. Called by the
objectives in `training.drafters`, and by `dspark data cache`, which builds the cache.
"""

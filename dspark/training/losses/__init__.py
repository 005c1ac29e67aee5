"""Losses of block and chain drafters, computed in vocabulary chunks.

Hidden states of drafter and target enter; losses with exact gradients and per-position metrics
leave. Called by the objectives in `training.drafters`.
"""

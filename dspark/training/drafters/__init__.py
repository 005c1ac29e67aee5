"""Drafter training: new drafters, their objectives and held-out measurements.

A drafter recipe and a frozen target enter; the loss of each step, accepted lengths on held-out
prompts and the exported drafter leave. Called by `training.run`.
"""

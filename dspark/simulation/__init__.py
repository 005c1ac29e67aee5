"""Capacity planning: servers simulated on measured cost tables.

A cost table, an acceptance profile and an arrival process enter; throughput, times to first token,
per-user speeds and the rates that keep a service level leave. Called by `dspark plan`. Scheduling
is the engine's own: `step_plan` shares steps among prompts, `Scheduler` decides about drafts.
"""

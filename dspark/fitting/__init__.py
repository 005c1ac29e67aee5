"""From a model to a served drafter: `dspark fit`.

A model, a time budget and optionally prompts enter; a drafter with its calibration, a cost table
and an evaluation leave. This room holds the order of the stages, the division of the budget and the
state of a run; the stages use `data`, `training` and `evaluation`. Called by the command line.
"""

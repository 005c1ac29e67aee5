"""From a model to a served drafter: `dspark fit`.

A model, a time budget and perhaps prompts enter; a drafter with its calibration, a cost table and
an evaluation leave. The room holds the order of the stages, how the budget is split among them and
what is remembered of a run; the stages themselves are those of `data`, `training` and `evaluation`.
The command line calls it.
"""

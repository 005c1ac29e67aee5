"""Prompt collection: sources, deduplication, decontamination and self-written prompts.

JSON lines, folders, hub data sets or a model enter; prompt files that `dspark data regenerate`
reads leave. Called by `dspark data prompts`, `dspark eval` (sources) and `dspark fit`.
"""

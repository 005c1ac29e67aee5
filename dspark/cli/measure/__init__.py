"""The commands that measure: bench, calibrate, check, eval and report, plan, profile, prove.

Options come in as dataclasses (`cli.groups`), tables go to the screen, and each command returns its
JSON object. `decoding` times an engine and sets plain beside speculative decoding, for generate and
demo too. What else is measured is computed by `dspark.evaluation` and `dspark.engine`.
"""

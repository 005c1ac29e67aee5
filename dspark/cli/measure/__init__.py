"""The commands that measure: bench, calibrate, check, eval, profile, prove, report.

Options come in as dataclasses (`cli.options`), tables go to the screen, and each command returns
its JSON object. What is measured is computed by `dspark.evaluation` and `dspark.engine`.
"""

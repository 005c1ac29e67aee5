"""Checks of a target and drafter pair: `dspark check`.

A model with its drafter enters; findings with severity and remedy, and an expected speed-up, leave.
Called by the command line; `live.render` and `live.race` also by `dspark fit`.
"""

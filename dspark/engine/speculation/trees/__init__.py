"""Draft trees: several continuations of a request, of which one forward may keep any path.

A drafter's lattice enters; the kept path and the token after it leave. `growth` chooses nodes by
survival, `draft` asks the drafter and makes laws and chances of its lattice, `forest` is what a
round verifies, `verify` judges it. Called by the round in place of `draft` and `verify`.
"""

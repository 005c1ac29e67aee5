"""The parts of a round: draft, schedule, verify, and what is remembered of it.

`dspark.engine.round` calls them in this order. Sampling state, a row per request, enters; tokens
that are kept, with a record of the round for whoever watches, leave.
"""

"""Checkpoints of drafters: a module per layout, and one that reads and writes them all.

A directory, hub id or GGUF file enters `checkpoint.load_drafter`, an unbound drafter leaves; `save`
and its siblings go the other way. Engine, training and command line call these; what differs
between layouts is declared by `plugins.Layout` and listed in `registry`.
"""

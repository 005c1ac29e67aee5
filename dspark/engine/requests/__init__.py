"""Requests in flight: from a prompt to admission, to text, to an end.

A `Request` that passes validation becomes a `Sequence`, waits until admission finds pages for it,
takes part in the steps that the step plan gives it, and turns tokens into text by its detokenizer.
`engine` calls all of this; nothing here knows how tokens are drafted or verified.
"""

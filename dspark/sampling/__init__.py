"""Distributions of tokens, and whether a draft may stay.

Logits and sampling parameters enter; distributions, tokens and accepted lengths leave. The engine's
rounds and the exact proof call the same functions.
"""

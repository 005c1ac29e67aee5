"""Losslessness proof by enumeration of small worlds in float64: `dspark prove`.

A seed enters; one case per rule, schedule and wrong variant leaves, each with its total variation
from plain decoding. Called by the command line and by tests.
"""

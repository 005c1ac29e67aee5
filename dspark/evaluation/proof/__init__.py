"""Losslessness proved in small worlds: every path, length and outcome, in float64."""

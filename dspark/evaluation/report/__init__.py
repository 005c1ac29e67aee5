"""Evaluation reports as HTML, Markdown, JSON and figures.

Run records enter; a report of figures, tables and comparisons leaves. Called by `dspark eval` and
`dspark fit`.
"""

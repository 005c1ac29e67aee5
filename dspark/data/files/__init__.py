"""Files of long runs: JSON lines, resumable journals and atomic writes.

Records enter; files that a crash, a full disk or a second run cannot corrupt leave. Called by every
room that writes output.
"""

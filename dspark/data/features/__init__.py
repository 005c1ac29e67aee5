"""The feature cache: target features on disk, compact, checksummed and resumable.

Samples and a target enter; coded feature rows and teacher states leave. Called by
`dspark data cache` and by training with `features.source` cache or hybrid.
"""

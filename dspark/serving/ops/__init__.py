"""Operation of the server: health, metrics, request limits and logs.

`counters` and `snapshot` are written by the engine's thread and read by `metrics`; `middleware`
checks every request before a route sees it; `health` and `logs` are for supervisors.
"""

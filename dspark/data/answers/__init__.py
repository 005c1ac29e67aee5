"""Answer regeneration: the target rewrites every assistant turn of a prompt file.

Prompt files and a backend (this package's engine or OpenAI-compatible servers) enter; conversations
for training leave. Called by `dspark data regenerate` and `dspark fit`.
"""

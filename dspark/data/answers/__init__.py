"""Answer regeneration: the target answers every assistant turn of a prompt file anew.

Prompt files and a backend (this package's engine or OpenAI-compatible servers) enter; conversations
for training leave. Called by `dspark data regenerate` and `dspark fit`.
"""

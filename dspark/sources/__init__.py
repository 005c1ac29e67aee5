"""From what a user names to files on this machine: models that ship, the hub, GGUF files.

A directory, hub id, `.gguf` file or shipped name enters; a directory of safetensors leaves, or the
hub id as it came where the loaders fetch it themselves. Targets, drafters, data and the command
line ask here, so that all of them know the same names.
"""

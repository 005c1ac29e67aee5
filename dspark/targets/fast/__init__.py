"""The quick path of a decoding step on a CPU.

A target's modules come in; packed products (`products`), how they are chosen on this machine
(`packing`) and a flat decoder for the common architectures (`decoder`) come out. `Target` calls it
at load, and drafters pack their own weights through the target's parts. Everywhere else the plain
path runs, which computes the same.
"""

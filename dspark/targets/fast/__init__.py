"""Ways to run a target faster, each tried out at load against the model's own forward.

On a CPU: packed products (`products`), chosen by trial on this machine (`packing`), a flat decoder
for the common architectures (`decoder`). On an accelerator: CUDA graphs (`graphs`). Anywhere: RMS
norms in one call, and `torch.compile`. `install` does it at load, for `Target`, and drafters pack
their own weights through the target's parts. What none of them fits runs as it is.
"""

"""Ways to run a target faster, each tried out at load against the model's own forward.

On a CPU: packed products (`products`), chosen by trial on this machine (`packing`), a flat decoder
for the common architectures (`decoder`), and RMS norms in one call (`norms`). On an accelerator:
CUDA graphs (`graphs`). Anywhere: `torch.compile` (`compiled`). `Target` calls them at load, and
drafters pack their own weights through the target's parts. What none of them fits runs as it is.
"""

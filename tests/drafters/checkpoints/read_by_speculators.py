"""Runs in speculators's Python: its forward of written files against the golden outputs.

`python read_by_speculators.py GOLDEN WRITTEN NAME …` prints, by name and tensor, the largest
difference.
"""

import json
import os
import sys
from pathlib import Path


def main(golden: str, written: str, *names: str) -> None:
    """Print one JSON line."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, golden)
    import make
    from safetensors.torch import load_file
    from speculators import SpeculatorModel, SpeculatorModelConfig

    os.chdir(golden)  # where the target lies
    far = {}
    for name in names:
        path = str(Path(written, name))
        config = SpeculatorModelConfig.from_pretrained(path)
        # Its default, flex attention, wants lengths in blocks of 128.
        layers = config.transformer_layer_config
        layers._attn_implementation = "eager" if "eagle" in name else "sdpa"
        model = SpeculatorModel.from_pretrained(path, config=config).eval()
        found, wanted = make.forward(name, model), load_file(f"{name}/forward.safetensors")
        far[name] = {
            key: float((found[key].float() - value.float()).abs().max())
            for key, value in wanted.items()
        }
    print(json.dumps(far))


if __name__ == "__main__":
    main(*sys.argv[1:])

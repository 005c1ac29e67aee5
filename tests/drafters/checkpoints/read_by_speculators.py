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
    from speculators import SpeculatorModel

    os.chdir(golden)  # where the target lies
    far = {}
    for name in names:
        model = SpeculatorModel.from_pretrained(str(Path(written, name))).eval()
        found, wanted = make.forward(name, model), load_file(f"{name}/forward.safetensors")
        far[name] = {
            key: float((found[key].float() - value.float()).abs().max())
            for key, value in wanted.items()
        }
    print(json.dumps(far))


if __name__ == "__main__":
    main(*sys.argv[1:])

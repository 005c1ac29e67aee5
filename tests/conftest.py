"""One thread per test process: tiny tensors gain nothing from more, and cores may be shared."""

import torch

torch.set_num_threads(1)

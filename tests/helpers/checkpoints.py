"""Layouts of drafters by the names that tests give them."""

from functools import partial

from dspark.drafters.checkpoints.checkpoint import save
from dspark.drafters.checkpoints.registry import SPECULATORS

save_published = save
save_speculators = partial(save, layout=SPECULATORS)

"""The name `bundled` names a drafter wherever the names of its siblings do."""

import pytest

from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.checkpoints.files import resolve
from dspark.engine.loading import load, load_draft
from dspark.sources.names import BUNDLED_DRAFTERS

NAMES = ("bundled", *BUNDLED_DRAFTERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_drafter_of_the_bundled_model(name):
    assert resolve(name, None, True).is_dir()
    assert load_drafter(name, offline=True).block_size >= 1
    model = load("bundled", draft=name, dtype="float32", offline=True)
    assert model.name == name
    output = model.generate("Tom has 3 apples", max_new_tokens=8)
    own = load_draft(model.target, name)
    assert own.generate("Tom has 3 apples", max_new_tokens=8).token_ids == output.token_ids
    assert output.stats.drafted > 0


def test_bundled_is_the_drafter_attached_to_the_bundled_model():
    attached = load("bundled", dtype="float32").generate(
        "Tom has 3 apples", max_new_tokens=24, schedule="fixed"
    )
    named = load("bundled", draft="bundled", dtype="float32").generate(
        "Tom has 3 apples", max_new_tokens=24, schedule="fixed"
    )
    assert named.stats == attached.stats

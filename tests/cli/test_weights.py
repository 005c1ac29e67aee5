"""`--weights` and `--quantize` act, and refuse what cannot be."""

import pytest


def test_the_kind_of_weights_is_said_at_the_start(dspark):
    arguments = ("generate", "bundled", "--prompt", "One", "--max-new-tokens", "4")
    done = dspark(*arguments, "--quantize", "int8")
    assert done.status == 0
    assert "quantised to 8 bits" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "light"), "weights is 'light', but must be one of auto, plain, packed"),
        (("--quantize", "int3"), "quantize is 'int3', but must be int8"),
        (("--quantize", "int8", "--weights", "plain"), "leave weights at auto"),
        (("--quantize", "int8", "--batch-invariant"), "Packed weights and batch_invariant exclude"),
    ],
)
def test_refusals(dspark, options, message):
    done = dspark("generate", "bundled", "--prompt", "One", *options)
    assert done.status != 0
    assert message in " ".join(done.err.split())

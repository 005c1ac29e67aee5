"""What is said of other libraries' errors."""

import pytest

from dspark.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Out of memory."), "Out of memory"),
        (OSError("\n  401 Client Error. \nRepository not found"), "401 Client Error"),
        (KeyError(), "KeyError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_an_error_is_said_in_its_first_line_or_by_its_kind(error, said):
    assert first_line(error) == said

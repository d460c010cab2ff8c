"""What a message quotes of another error."""

import pytest

from poprisk._validate import LONGEST, first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (RuntimeError("\n  two"), "RuntimeError: two"),
        (NotImplementedError(), "NotImplementedError"),
        (AssertionError(" \n"), "AssertionError"),
        (KeyError("name"), "KeyError: 'name'"),
        (ValueError("x" * 2 * LONGEST), "ValueError: " + "x" * LONGEST),
    ],
)
def test_an_error_is_quoted_on_one_line_even_if_it_says_nothing(
    error: Exception, expected: str
) -> None:
    assert first_line(error) == expected

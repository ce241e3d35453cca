"""Sizes as people read them."""

from __future__ import annotations

import pytest

from holdfast.sizes import describe_size

SIZES = [
    (0, "0 B"),
    (1023, "1023 B"),
    (1024, "1.00 KiB"),
    (10 * 2**20, "10.0 MiB"),
    (9.999 * 2**20, "10.0 MiB"),
    (999 * 2**20, "999 MiB"),
    (2**30 - 1, "1.00 GiB"),
    (1.5 * 2**40, "1.50 TiB"),
    (5000 * 2**40, "5000 TiB"),
]


@pytest.mark.parametrize(("size_bytes", "text"), SIZES)
def test_a_size_has_three_digits_and_a_binary_unit(size_bytes: float, text: str) -> None:
    """Every size is stated in the unit in which three digits say it."""
    assert describe_size(size_bytes) == text

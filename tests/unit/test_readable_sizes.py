"""Sizes as people read them, and the setting that an unknown one was meant to be."""

from __future__ import annotations

import pytest

from holdfast.messages import describe_size, suggest

SIZES = [
    (0, "0 B"),
    (1023, "1023 B"),
    (1024, "1.0 KiB"),
    (10 * 2**20, "10.0 MiB"),
    (2**20 - 1, "1.0 MiB"),
    (999 * 2**20, "999.0 MiB"),
    (2**30 - 1, "1.00 GiB"),
    (1.5 * 2**40, "1.50 TiB"),
    (5000 * 2**40, "5000.00 TiB"),
]


@pytest.mark.parametrize(("size_bytes", "text"), SIZES)
def test_a_size_has_a_binary_unit(size_bytes: float, text: str) -> None:
    """A size is stated in the largest unit of which it is at least one."""
    assert describe_size(size_bytes) == text


@pytest.mark.parametrize(
    ("size_bytes", "beside", "text"),
    [(2**18, 2**21, "0.2 MiB"), (2**40, 2**21, "1.00 TiB"), (5, 2**30, "0.00 GiB")],
)
def test_a_size_takes_the_unit_of_what_it_is_compared_with(
    size_bytes: float, beside: float, text: str
) -> None:
    """What is free has the unit of what is needed, or a larger one."""
    assert describe_size(size_bytes, beside) == text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("stepz", "steps"),
        ("learning_rate", "optim.learning_rate"),
        ("pretrained", "load.pretrained.directory"),
        ("load.pretrained", "load.pretrained.directory"),
        ("lr", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("bs", "batch_size"),
        ("x", None),
        ("colour", None),
    ],
)
def test_an_unknown_setting_is_understood(typed: str, meant: str | None) -> None:
    """By its last part, by its section, by similar letters, or by the initials of its words."""
    known = ["steps", "batch_size", "optim.learning_rate", "optim.beta1", "load.step"]
    known += ["load.pretrained.directory", "load.pretrained.what"]
    assert suggest(typed, known) == meant

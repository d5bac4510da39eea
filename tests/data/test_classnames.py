"""Spellings of one class in any script, and two classes with one spelling."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError
from pipeline.data.classnames import by_plain_name, plain_name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("aquarium_fish", "Aquarium fish"),
        ("St. Bernard's dog", "st bernards-dog"),
        ("café", "cafe\u0301"),
        ("Straße", "STRASSE"),
        ("ＡＢＣ", "abc"),
        ("ไทย", "ไทย "),
    ],
)
def test_spellings_of_one_class_are_one_name(one, other):
    assert plain_name(one) == plain_name(other)


@pytest.mark.parametrize(
    ("one", "other"), [("猫", "鳥"), ("कि", "का"), ("кот", "пёс"), ("resume", "résumé"), ("C++", "C#"), ("!", "?")]
)
def test_names_in_any_script_stay_apart(one, other):
    assert plain_name(one) != plain_name(other)


def test_collision_is_an_error_that_names_both():
    with pytest.raises(ConfigError, match=r"pets: the class names 'Sea Lion' and 'sea-lion' differ only in case"):
        by_plain_name(["dog", "Sea Lion", "sea-lion"], "pets")
    assert by_plain_name(["crane", "crane"], "imagenet") == {"crane": "crane"}

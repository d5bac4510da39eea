"""The promotion rule in the config: accepted values, and no effect on results."""

from __future__ import annotations

import pytest

from pipeline.config import Config, ConfigError, digest, override

BASE = Config.model_validate({"data": {"train": "shards"}})


def test_floors_are_read_as_numbers() -> None:
    rule = override(BASE, {"promote.min_dataset": ["pets >= 0.85", "imagenet-r>=.5"]}).promote
    assert rule.floors() == {"pets": 0.85, "imagenet-r": 0.5}


@pytest.mark.parametrize("entry", ["pets > 0.85", "pets 0.85", ">= 0.85", "pets >= 85", "pets >= -1"])
def test_a_floor_of_another_form_names_the_right_form(entry: str) -> None:
    """A floor of another form is reported with the form it should have."""
    with pytest.raises(ConfigError, match=r"promote.min_dataset: .* should be KEY >= SHARE"):
        override(BASE, {"promote.min_dataset": [entry]})


def test_percent_instead_of_a_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="promote.min_id: should be less than or equal to 1, got 75"):
        override(BASE, {"promote.min_id": 75.0})


def test_the_rule_changes_no_digest() -> None:
    assert digest(override(BASE, {"promote.min_id": 0.7, "promote.champion": "always"})) == digest(BASE)

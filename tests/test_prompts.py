"""Templates and class names are data that other programs share; they have to be the same data."""

from __future__ import annotations

from pathlib import Path

import pytest
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from pipeline.config import ConfigError
from pipeline.prompts import TEMPLATES, caption, read_classnames, readable_name, resolve_templates


def test_the_sets_are_those_of_open_clip() -> None:
    assert [caption(t, "hat") for t in TEMPLATES["openai"]] == [t("hat") for t in OPENAI_IMAGENET_TEMPLATES]
    assert [caption(t, "hat") for t in TEMPLATES["openai7"]] == [t("hat") for t in SIMPLE_IMAGENET_TEMPLATES]
    assert resolve_templates("simple") == ("a photo of a {c}.",)


def test_a_caption_replaces_the_placeholder_and_nothing_else() -> None:
    assert caption("{c}: {x} {}", "a {c}") == "a {c}: {x} {}"


def test_wrong_templates_are_errors_that_name_them() -> None:
    with pytest.raises(ConfigError, match="'opnai'.*name, openai, openai7, simple"):
        resolve_templates("opnai")
    with pytest.raises(ConfigError, match="a photo"):
        resolve_templates(["{c}", "a photo"])
    with pytest.raises(ConfigError, match="empty"):
        resolve_templates([])


def test_folder_names_become_readable_and_keep_their_hyphens() -> None:
    assert [readable_name(name) for name in ("ankle_boot", "t-shirt", "__big__dog_")] == [
        "ankle boot",
        "t-shirt",
        "big dog",
    ]


def test_classnames_come_by_line_or_by_folder(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("tench\ngreat white shark\n")
    assert read_classnames(file, ["n01", "n02"]) == ["tench", "great white shark"]
    file.write_text("n02\tshark\nn03\tray\nn01\ttench\n")
    assert read_classnames(file, ["n01", "n02"]) == ["tench", "shark"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tench\n", "1 class names for 2 classes"),
        ("n02\tshark\n", "no name for 1 of 2 classes, first: n01"),
        ("n02\tshark\nn01\n", "'n01' is not 'folder<TAB>name'"),
    ],
)
def test_classnames_that_do_not_fit_are_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_classnames(tmp_path / "names.txt", ["n01", "n02"])

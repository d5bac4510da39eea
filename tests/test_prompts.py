"""Templates and class names equal those of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from pipeline.config import ConfigError
from pipeline.config.templates import TEMPLATES
from pipeline.prompts import caption, natural_key, read_classnames, readable_name, resolve_templates


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


@pytest.mark.parametrize("sentence", ["a photo of {}.", "%s", "a {x}", "{c:>9}", "{ c }", "{C}"])
def test_placeholders_of_other_tools_are_refused(sentence: str) -> None:
    """A template without {c} would train and evaluate sentences that name no class."""
    with pytest.raises(ConfigError, match="has no {c}.*write {c}"):
        resolve_templates(["a {c}", sentence])


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
        ("n02\tshark\n", "no name for 1 of 2 classes: n01"),
        ("n02\tshark\nn01\n", "'n01' is not 'folder<TAB>name'"),
    ],
)
def test_classnames_that_do_not_fit_are_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_classnames(tmp_path / "names.txt", ["n01", "n02"])


@pytest.mark.parametrize(
    "text",
    [
        "n02 shark, great white\nn01 tench, Tinca tinca\n",
        "n01: tench, Tinca tinca\n\nn02: shark, great white\n",
        "n03,ray\nn02,shark, great white\nn01,tench, Tinca tinca\n",
        "n01 = tench, Tinca tinca\r\nn02 = shark, great white\r\n",
        "\ufeffn01\ttench, Tinca tinca\n\nn02\tshark, great white\n\n",
    ],
)
def test_lines_that_begin_with_a_folder_are_a_mapping(tmp_path: Path, text: str) -> None:
    """Kaggle's and Keras's lists begin with the wnid, which must not become part of the name."""
    (tmp_path / "names.txt").write_text(text, encoding="utf-8", newline="")
    assert read_classnames(tmp_path / "names.txt", ["n01", "n02"]) == ["tench, Tinca tinca", "shark, great white"]


def test_a_mapping_without_one_folder_is_refused(tmp_path: Path) -> None:
    """Read as plain lines it would fit by number, and every name would hold a wnid."""
    (tmp_path / "names.txt").write_text("n01 tench\nn02 shark\nn04 ray\n")
    with pytest.raises(ConfigError, match="no name for 1 of 3 classes: n03"):
        read_classnames(tmp_path / "names.txt", ["n01", "n02", "n03"])


@pytest.mark.parametrize(
    "content", [{"n02": "shark", "n01": "tench"}, ["tench", "shark"], {"0": ["n01", "tench"], "1": ["n02", "shark"]}]
)
def test_classnames_may_be_json(tmp_path: Path, content: object) -> None:
    (tmp_path / "names.json").write_text(json.dumps(content))
    assert read_classnames(tmp_path / "names.json", ["n01", "n02"]) == ["tench", "shark"]


def test_plain_names_of_numbered_classes_go_by_number(tmp_path: Path) -> None:
    """As strings 10 comes before 2, and ten of twelve names would be wrong."""
    names = [f"name {number}" for number in range(12)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    folders = sorted((str(number) for number in range(12)), key=natural_key)
    assert read_classnames(tmp_path / "names.txt", folders) == names
    assert folders == [str(number) for number in range(12)]


def test_plain_names_are_refused_where_two_orders_differ(tmp_path: Path) -> None:
    """For class1 .. class12 it cannot be known whether the user counted or sorted."""
    folders = sorted((f"class{number}" for number in range(1, 13)), key=natural_key)
    (tmp_path / "names.txt").write_text("\n".join(f"name {number}" for number in range(12)))
    with pytest.raises(ConfigError, match="from class2 on; write 'folder<TAB>name' lines, as in 'class1<TAB>name 0'"):
        read_classnames(tmp_path / "names.txt", folders)
    (tmp_path / "names.txt").write_text("\n".join(f"{folder}\tname of {folder}" for folder in reversed(folders)))
    assert read_classnames(tmp_path / "names.txt", folders)[1] == "name of class2"


def test_a_names_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nowhere.txt: cannot be read .No such file"):
        read_classnames("nowhere.txt", ["n01"])


def test_names_match_folders_of_the_other_unicode_form(tmp_path: Path) -> None:
    """macOS writes \u00e9 in a file name as e and an accent."""
    (tmp_path / "names.txt").write_text("cafe\u0301\tcoffee\nthe\u0301\ttea\n", encoding="utf-8")
    assert read_classnames(tmp_path / "names.txt", ["caf\u00e9", "th\u00e9"]) == ["coffee", "tea"]

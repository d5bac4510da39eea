"""Config files: YAML 1.2 scalars, repeated keys, inheritance, and unreadable files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.config.yaml_file import dump_yaml, parse_value, read_chain, read_overrides


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(text: str | bytes, name: str = "c.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("1_000", "1_000"),
        ("null", None),
        ("~", None),
        ("", None),
        ("e5", "e5"),
        ("[1, a, 1e-3]", [1, "a", 1e-3]),
        ("a=b", "a=b"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-5", "off", "yes", "010", "0o7", "null", "", "12:30", "a: b", 1e-5, 3, True, None]
)
def test_what_is_dumped_is_read_back_as_the_same(value):
    read = parse_value(dump_yaml(value))
    assert read == value
    assert type(read) is type(value)


def test_python_objects_are_refused(write):
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        read_chain(write("a: !!python/object/apply:os.system [true]\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"^a: given twice \(c.yaml:3, and before at line 1\)$"),
        ("s:\n  a: 1\n  a: 2\n", r"^s.a: given twice \(c.yaml:3, and before at line 2\)$"),
        ("s: {a: 1}\ns: {b: 2}\n", r"^s: given twice \(c.yaml:2"),
        ("s.a: 1\ns: {a: 2}\n", r"^s.a: given twice \(c.yaml:2, and before at c.yaml:1\)$"),
        ("l: [{a: 1, a: 2}]\n", r"^c.yaml: line 1: a is given twice$"),
    ],
)
def test_repeated_key_is_an_error_that_names_both_lines(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_chain(write(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\n", "c.yaml: line 2"),
        ("a:\n\t- b\n", "cannot start any token"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("just text\n", "expected `key: value` lines"),
        ("? [a, b]\n: 1\n", "c.yaml:1: a key should be a name"),
        (b"a: \xff\xfe\n", "c.yaml:1: byte 0xff (number 4 of the file) is not UTF-8"),
        ("a: &x {b: *x}\n", "alias"),
        ("a: *nowhere\n", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "another document"),
    ],
)
def test_unreadable_file_says_why(write, text, message):
    with pytest.raises(ConfigError) as caught:
        read_chain(write(text))
    assert message in str(caught.value)


def test_missing_file_and_missing_base_are_named(write, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read config file nowhere.yaml: No such file"):
        read_chain("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"gone.yaml: No such file.*named as base by d/c.yaml"):
        read_chain(write("base: gone.yaml\n", "d/c.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        read_chain(tmp_path)
    with pytest.raises(ConfigError, match=r"base: should be the name of a file, got 3 \(c.yaml:1\)"):
        read_chain(write("base: 3\n"))


def test_base_is_relative_to_its_file_and_the_nearest_wins(write):
    write("a: 1\nb: 1\ns: {x: 1, y: 1}\n", "root.yaml")
    write("base: ../root.yaml\nb: 2\ns: {y: 2}\n", "sub/mid.yaml")
    values = read_chain(write("base: sub/mid.yaml\nc: 3\n", "top.yaml"))
    assert {key: raw.value for key, raw in values.items()} == {"a": 1, "b": 2, "c": 3, "s.x": 1, "s.y": 2}
    assert values["s.y"].origin == "sub/mid.yaml:3"
    assert values["s.x"].origin == "root.yaml:3"


def test_circle_of_bases_is_named(write):
    write("base: b.yaml\n", "a.yaml")
    write("base: c.yaml\n", "b.yaml")
    write("base: b.yaml\n", "c.yaml")
    with pytest.raises(ConfigError, match=r"in a circle: b.yaml -> c.yaml -> b.yaml$"):
        read_chain("a.yaml")
    write("base: self.yaml\n", "self.yaml")
    with pytest.raises(ConfigError, match=r"in a circle: self.yaml -> self.yaml$"):
        read_chain("self.yaml")


def test_empty_file_is_an_empty_mapping(write):
    assert read_chain(write("# nothing\n")) == {}


def test_overrides_report_every_fault_and_the_last_value_counts():
    values, faults = read_overrides(["a=1", "a=2", "nonsense", "=3", "b=[1", "c=x=y", "d="])
    assert {key: raw.value for key, raw in values.items()} == {"a": 2, "c": "x=y", "d": None}
    assert [fault.split(":")[0] for fault in faults] == ["nonsense", "=3", "b=[1"]

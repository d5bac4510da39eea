"""The paper's tables as data: the arithmetic finds exactly the known errata."""

from fractions import Fraction

import pytest

from pipeline.report.paper.tables import GATES, MEANS, TABLES, PaperRow, errata, findings, recompute, table

KNOWN = [erratum for erratum in errata() if erratum.finding is not None]


def test_the_checks_find_exactly_the_errata() -> None:
    assert {erratum.finding for erratum in KNOWN} == set(findings())


def test_the_mean_columns_are_wrong_in_two_tables_only() -> None:
    """Table 4's linear probe, and Table 15's seven rows of DoRA, whose IN-1K was copied from Table 14."""
    wrong = {(found.table, found.row) for found in findings() if found.check == "mean"}
    assert wrong == {(4, "Linear")} | {(15, f"DoRA {rank}") for rank in (4, 8, 16, 32, 64, 128, 256)}


def test_every_table_is_whole() -> None:
    counts = {number: len(table(number)) for number in TABLES}
    assert counts == {1: 4, 2: 3, 3: 22, 4: 22, 5: 6} | dict.fromkeys(range(6, 10), 4) | dict.fromkeys(
        range(10, 16), 16
    )
    for number in TABLES:
        assert all(None not in row.cells and None not in row.cells.values() for row in table(number))
        assert all(0 < value <= 100 for row in table(number) for value in row.values.values())


def test_corrected_table_15_means_hold() -> None:
    """The printed means belong to Table 13's IN-1K: with it, all seven come out."""
    exact = {row.name: row.cells["IN-1K"] for row in table(11)}
    for row in table(15):
        corrected = PaperRow(15, row.cells | {"IN-1K": exact.get(row.name, row.cells["IN-1K"])})
        assert abs(recompute(corrected)["mean"] - Fraction(row.cells["mean"])) <= Fraction("0.06")


def test_table_14_mean_was_computed_with_the_copied_recall() -> None:
    row = next(row for row in table(14) if row.name == "Ours 4")
    assert abs(recompute(row)["mean"] - Fraction("72.5")) <= Fraction("0.06")
    likely = PaperRow(14, row.cells | {"Flickr30k IR@5": "94.5"})
    assert abs(recompute(likely)["mean"] - Fraction("73.4")) <= Fraction("0.06")


@pytest.mark.parametrize("column", MEANS)
def test_a_changed_cell_would_be_found(column: str) -> None:
    row = next(row for row in table(12) if row.name == "LoRA 64")
    assert float(recompute(row)[column]) == pytest.approx(float(row.cells[column]), abs=0.06)
    changed = PaperRow(12, row.cells | {"FLW": "45.1"})  # two digits swapped
    assert float(recompute(changed)[column]) != pytest.approx(float(row.cells[column]), abs=0.06)


def test_errata_are_numbered_and_point_into_the_tables() -> None:
    """Errata are numbered without a gap and point into the tables."""
    numbers = [erratum.number for erratum in errata()]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 17))
    for erratum in KNOWN:
        assert erratum.finding is not None
        row = next(row for row in table(erratum.finding.table) if row.name == erratum.finding.row)
        assert row.cells[erratum.finding.column] == erratum.finding.printed == erratum.printed


def test_dino_has_72_gates_and_clip_144() -> None:
    assert GATES[4] == 72 and GATES[10] == 144

"""docs/attention.md: its table is today's, and it has a word on every row."""

from pathlib import Path

import pytest

from fastformer.attention import VARIANTS
from fastformer.report.family import costs, declared

DOCS = Path(__file__).parent.parent / "docs" / "attention.md"
BEGIN, END = "<!-- family:begin -->\n", "<!-- family:end -->"
PRINTS = "python -m fastformer.report.family prints what belongs there"


def rows() -> list[tuple[str, ...]]:
    lines = DOCS.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines]


def test_the_table_is_todays():
    assert [row[:4] for row in rows()] == [declared(name) for name in VARIANTS], PRINTS


# Tracing all of them takes longer than it is worth.
@pytest.mark.parametrize("name", [*list(VARIANTS)[::6], "moba", "native_sparse"])
def test_what_rows_cost_is_todays(name):
    assert rows()[list(VARIANTS).index(name)][4:] == costs(name), PRINTS


def test_every_row_is_explained():
    text = DOCS.read_text()
    assert [name for name in VARIANTS if f"\n- `{name}`:" not in text] == []

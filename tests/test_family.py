"""docs/attention.md: its table is today's, and it has a word on every row."""

from pathlib import Path

from fastformer.attention import VARIANTS
from fastformer.report.family import table

DOCS = Path(__file__).parent.parent / "docs" / "attention.md"


def test_the_table_is_todays():
    begin, end = "<!-- family:begin -->\n", "<!-- family:end -->"
    inside = DOCS.read_text().split(begin)[1].split(end)[0]
    assert inside.strip() == table(), "python -m fastformer.report.family prints what belongs there"


def test_every_row_is_explained():
    text = DOCS.read_text()
    assert [name for name in VARIANTS if f"\n- `{name}`:" not in text] == []

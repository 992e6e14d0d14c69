"""Finished runs side by side: a table and a picture of their size, quality and speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastformer.report import plots, tables
from fastformer.report.run_report import read_result

TEXT, PICTURE = "comparison.md", "comparison.png"


def write(runs: Mapping[str, Path], where: Path) -> str:
    """Write ``comparison.md`` and ``comparison.png`` into ``where``; return what is in the former.

    Args:
      runs: workdirs of finished runs of one task, by the name that they are shown under.
    """
    results = {name: read_result(folder) for name, folder in runs.items()}
    metric = next(iter(next(iter(results.values()))["quality"]))
    columns = {
        "parameters": ("parameters", "", tables.number),
        "bytes_on_disk": ("weights on disk", "bytes", tables.nbytes),
        metric: (f"held-out {metric.replace('_', ' ')}", metric.replace("_", " "), tables.number),
        "decode_tokens_per_second": ("decoding", "tokens/s", lambda value: tables.number(value, 3)),
    }
    found = {name: one | one["quality"] for name, one in results.items()}
    rows = [
        (name, *(show(one.get(key)) for key, (_, _, show) in columns.items())) for name, one in found.items()
    ]
    titles = (f"{title}, {unit}" if unit == "tokens/s" else title for title, unit, _ in columns.values())
    values = {key: {name: [one[key]] for name, one in found.items() if one.get(key)} for key in columns}
    panels = [plots.Panel(title, unit, values[key]) for key, (title, unit, _) in columns.items()]
    plots.arms(where / PICTURE, list(runs), panels)
    text = f"{tables.table(('run', *titles), rows)}\n\n![the same as a picture]({PICTURE})\n"
    (where / TEXT).write_text(text)
    return text

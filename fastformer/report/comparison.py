"""Finished runs side by side: a table and a picture of their size, quality and speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastformer.report import plots, tables
from fastformer.report.run_report import MEASURES, read_result

TEXT, PICTURE = "comparison.md", "comparison.png"


def write(runs: Mapping[str, Path]) -> str:
    """Write ``comparison.md`` and ``comparison.png`` into the first workdir; return what is in the former.

    Args:
      runs: workdirs of finished runs of one task, by the name that they are shown under.
    """
    where = next(iter(runs.values()))
    results = {name: read_result(folder) for name, folder in runs.items()}
    metric = next(iter(next(iter(results.values()))["quality"]))
    name = metric.replace("_", " ")
    columns = MEASURES | {metric: (f"held-out {name}", tables.number)}
    units = {
        "parameters": ("millions", 1e6),
        "bytes_on_disk": ("MB", 1e6),
        metric: (name, 1.0),
        "decode_tokens_per_second": ("tokens/s", 1.0),
    }
    rows, panels = [[name] for name in runs], []
    for key, (unit, scale) in units.items():
        title, show = columns[key]
        values = [one[key] for one in (found | found["quality"] for found in results.values())]
        for row, value in zip(rows, values):
            row.append(show(value))
        drawn = {name: [value / scale] for name, value in zip(runs, values) if value is not None}
        panels.append(plots.Panel(title.partition(",")[0], unit, drawn))
    plots.arms(where / PICTURE, list(runs), panels)
    table = tables.table(("run", *(columns[key][0] for key in units)), rows)
    text = f"{table}\n\n![the same as a picture]({PICTURE})\n"
    (where / TEXT).write_text(text)
    return text

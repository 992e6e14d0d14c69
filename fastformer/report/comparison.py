"""Finished runs side by side: a table and a picture of their size, quality and speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastformer.report import plots, tables
from fastformer.report.run_report import read_result

TEXT, PICTURE = "comparison.md", "comparison.png"


def write(runs: Mapping[str, Path]) -> str:
    """Write ``comparison.md`` and ``comparison.png`` into the first workdir; return what is in the former.

    Args:
      runs: workdirs of finished runs of one task, by the name that they are shown under.
    """
    where = next(iter(runs.values()))
    results = {name: read_result(folder) for name, folder in runs.items()}
    metric = next(iter(next(iter(results.values()))["quality"]))
    columns = {
        "parameters": ("parameters", tables.number, "millions", 1e6),
        "bytes_on_disk": ("weights on disk", tables.nbytes, "MB", 1e6),
        metric: (f"held-out {metric.replace('_', ' ')}", tables.number, metric.replace("_", " "), 1.0),
        "decode_tokens_per_second": (
            "decoding one sequence, tokens/s", lambda value: tables.number(value, 3), "tokens/s", 1.0,
        ),
    }  # fmt: skip
    rows, panels = [[name] for name in runs], []
    for key, (title, show, unit, scale) in columns.items():
        values = [one[key] for one in (found | found["quality"] for found in results.values())]
        for row, value in zip(rows, values):
            row.append(show(value))
        drawn = {name: [value / scale] for name, value in zip(runs, values) if value is not None}
        panels.append(plots.Panel(title.partition(",")[0], unit, drawn))
    plots.arms(where / PICTURE, list(runs), panels)
    table = tables.table(("run", *(title for title, *_ in columns.values())), rows)
    text = f"{table}\n\n![the same as a picture]({PICTURE})\n"
    (where / TEXT).write_text(text)
    return text

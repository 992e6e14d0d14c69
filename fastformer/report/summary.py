"""The results of an experiment in its README: table, picture, claims and origin, between markers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastformer.core.errors import UserError
from fastformer.report import claims, plots, tables
from fastformer.report.folder import Experiment, current

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README, PICTURE = "README.md", "results.png"

# Metric -> (heading, how its mean over seeds is written; None is mean and deviation).
COLUMNS = {
    "parameters": ("parameters", tables.number),
    "bytes_on_disk": ("on disk", tables.nbytes),
    "state_bytes": ("state", tables.nbytes),
    "flops_per_token": ("training FLOPs a token", tables.count),
    "train_tokens_per_second": ("training, tokens/s", None),
    "decode_tokens_per_second": ("decoding, tokens/s", None),
}
SPEEDS = ("train_tokens_per_second", "decode_tokens_per_second")

Rows = Mapping[tuple[str, int], Mapping[str, Any]]


def samples(experiment: Experiment, rows: Rows, metric: str) -> dict[str, list[float]]:
    """Return ``{arm: one value of the metric a seed}``."""
    found: dict[str, list[float]] = {arm: [] for arm in experiment.arms}
    for (arm, _), row in sorted(rows.items()):
        if metric in row["metrics"]:
            found[arm].append(row["metrics"][metric])
    return found


def verdicts(experiment: Experiment, rows: Rows) -> list[claims.Verdict]:
    """Return what became of each claim.

    Raises:
      UserError: the runs are there and none has the metric of a claim, or one that the table shows.
    """
    recorded = sorted({metric for row in rows.values() for metric in row["metrics"]})
    for metric in (*experiment.quality, *(claim.metric for claim in experiment.claims)):
        if recorded and metric.startswith("quality.") and metric not in recorded:
            known = ", ".join(name for name in recorded if name.startswith("quality."))
            raise UserError(
                f"{experiment.path / 'config.py'}: no run has the metric {metric!r} (they have: {known})"
            )
    return [claims.check(claim, samples(experiment, rows, claim.metric)) for claim in experiment.claims]


def section(experiment: Experiment, all_rows: Iterable[Mapping[str, Any]]) -> str:
    """Return what stands between the markers, from the lines of results.jsonl."""
    rows = current(all_rows, experiment)
    parts = [_arms(experiment), _table(experiment, rows)]
    if rows:
        parts.append(f"![quality and speed of every arm]({PICTURE})")
    if experiment.claims:
        lines = [f"- **{v.outcome}**: {v.claim.text} ({v.figures})" for v in verdicts(experiment, rows)]
        parts.append("\n".join(["Claims, checked by every full run:", "", *lines]))
    parts.append(_origin(rows))
    return "\n\n".join(parts)


def write(experiment: Experiment, all_rows: Iterable[Mapping[str, Any]], where: Path) -> None:
    """Write the section into ``where/README.md`` (made when it is not there) and the picture beside it.

    Raises:
      UserError: the README has lost its markers.
    """
    all_rows = list(all_rows)
    readme = where / README
    text = readme.read_text() if readme.is_file() else skeleton(experiment)
    readme.parent.mkdir(parents=True, exist_ok=True)
    readme.write_text(replace(text, section(experiment, all_rows), readme))
    rows = current(all_rows, experiment)
    if rows:
        metrics = (*experiment.quality, *SPEEDS)
        found = {metric: samples(experiment, rows, metric) for metric in metrics}
        # A run that does not train has no speed of it.
        panels = [plots.Panel(*_heading(name), arms) for name, arms in found.items() if any(arms.values())]
        plots.arms(where / PICTURE, list(experiment.arms), panels)


def replace(text: str, new: str, readme: Path) -> str:
    """Return ``text`` with ``new`` between the markers.

    Raises:
      UserError: the markers are not there, once each, in order.
    """
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed or BEGIN in after or END in after:
        raise UserError(f"{readme}: the lines {BEGIN} and {END} must stand in it, once each, in this order")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def skeleton(experiment: Experiment) -> str:
    """Return the README of a folder that has none yet."""
    about = experiment.about
    name, question = (text[0].upper() + text[1:] for text in (experiment.name, about["Question"]))
    return (
        f"# {name}\n\n{question}\n\n"
        f"Expected: {about['Expectation']} ({about['Source']})\n\n"
        f"To remake it ({about['Minutes']} minutes on {about['Hardware']}):\n\n"
        f"```\n{about['Command']}\n```\n\n"
        f"{BEGIN}\n{END}\n"
    )


def _arms(experiment: Experiment) -> str:
    return "\n".join(f"- `{arm}`: {meaning}" for arm, meaning in experiment.arms.items())


def _table(experiment: Experiment, rows: Rows) -> str:
    columns = {metric: (_heading(metric)[0], None) for metric in experiment.quality} | COLUMNS
    lines = []
    for arm in experiment.arms:
        done = sum(1 for name, _ in rows if name == arm)
        cells = [arm, f"{done} of {len(experiment.seeds)}" if done < len(experiment.seeds) else str(done)]
        for metric, (_, write_mean) in columns.items():
            values = samples(experiment, rows, metric)[arm]
            mean = sum(values) / len(values) if values else None
            none = done and not values  # as the speed of training of a run that does not train
            cells.append("none" if none else write_mean(mean) if write_mean else tables.mean_std(values))
        lines.append(cells)
    return tables.table(("arm", "seeds", *(heading for heading, _ in columns.values())), lines)


def _heading(metric: str) -> tuple[str, str]:
    """Return a metric's title and its unit."""
    if metric in SPEEDS:
        return COLUMNS[metric][0].split(",")[0], "tokens/s"
    name = metric.removeprefix("quality.").replace("_", " ")
    return f"held-out {name}", name


def _origin(rows: Rows) -> str:
    if not rows:
        return f"Hardware and commit: {tables.NOT_RUN}."
    devices = _listed(row.get("device") for row in rows.values())
    commits = _listed(f"`{row['commit']}`" for row in rows.values() if row.get("commit"))
    versions = _listed(
        ", ".join(f"{name} {number}" for name, number in sorted((row.get("versions") or {}).items()))
        for row in rows.values()
    )
    return (
        f"Mean ± standard deviation over seeds. Hardware: {devices}. Commit: {commits}. Versions: {versions}."
    )


def _listed(items: Iterable[Any]) -> str:
    return "; ".join(sorted({str(item) for item in items if item})) or tables.NOT_RUN

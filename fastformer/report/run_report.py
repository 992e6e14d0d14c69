"""The report of one run: report.md and loss.png in its workdir."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastformer.core import config as configuration
from fastformer.core.errors import MALFORMED, UserError
from fastformer.report import plots, tables

RESULT, METRICS, REPORT, PICTURE = "result.json", "metrics.jsonl", "report.md", "loss.png"
SLOW_DATA = 0.1  # fraction of training's time
YARDSTICKS = {
    "gzip_bits_per_byte": "gzip -9 on the same bytes, bits per byte",
    "xz_bits_per_byte": "xz -9 on the same bytes, bits per byte",
}
MEASURES = {
    "parameters": ("parameters", tables.number),
    "bytes_on_disk": ("weights on disk", tables.nbytes),
    "train_tokens_per_second": ("training, tokens/s", lambda value: tables.number(value, 3)),
    "decode_tokens_per_second": ("decoding one sequence, tokens/s", lambda value: tables.number(value, 3)),
    "state_bytes": ("state of one sequence as long as a row", tables.nbytes),
    "flops_per_token": ("training FLOPs a token", tables.count),
    "peak_memory_bytes": ("peak memory of a device in training", tables.nbytes),
    "wall_seconds": ("training and its evaluations", tables.seconds),
}


def write_report(workdir: Path) -> Path:
    """Write ``report.md`` and ``loss.png`` from what a run left in its workdir; return the report's path.

    Works for a run that was interrupted too: what is not there yet reads "not run".

    Raises:
      UserError: the workdir holds no ``config.json``.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir: {workdir} holds no run (there is no config.json)")
    config = configuration.from_json((workdir / "config.json").read_text())
    metrics = read_metrics(workdir)
    result = read_result(workdir)
    train, heldout = _curve(metrics, "train"), _curve(metrics, "heldout")
    plots.loss_curve(workdir / PICTURE, train, heldout, config.name)
    parts = [
        f"# {config.name}" + (f" ({workdir.name})" if workdir.name != config.name else ""),
        _headline(config, result, train),
        _results(result),
        f"![loss over steps: training and held-out]({PICTURE})",
        _samples(result),
        _origin(config, result, workdir),
        "<details><summary>Configuration</summary>\n\n```json\n"
        f"{configuration.to_json(config)}```\n\n</details>",
    ]
    path = workdir / REPORT
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def read_result(workdir: Path) -> dict[str, Any]:
    """Return what ``result.json`` holds; empty for a run that has not ended, or if it is not as written."""
    try:
        found = json.loads((Path(workdir) / RESULT).read_text())
        numbers = [*found["quality"].values(), *found.get("yardsticks", {}).values()]
        numbers += [value for name in MEASURES if (value := found.get(name)) is not None]
        whole = all(map(_is_number, [found["step"], *numbers]))
        return found if whole and all(isinstance(text, str) for text in found.get("samples", ())) else {}
    except (OSError, *MALFORMED):
        return {}


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``; those that a crash cut short or an editor broke are left out."""
    path, found = Path(workdir) / METRICS, []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            whole = isinstance(line["step"], int) and isinstance(line["split"], str)
            whole = whole and all(_is_number(value) for name, value in line.items() if name != "split")
        except MALFORMED:
            whole = False
        found += [line] if whole else []
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curve(metrics: Sequence[Mapping[str, Any]], split: str) -> plots.Curve:
    # A run that went on from a checkpoint may have written a step twice; the later line counts.
    points = {line["step"]: line["loss"] for line in metrics if line["split"] == split and "loss" in line}
    steps = sorted(points)
    return plots.Curve(steps, [points[step] for step in steps])


def _headline(config: Any, result: Mapping[str, Any], train: plots.Curve) -> str:
    steps = config.train.steps
    if not result:
        reached = f"step {train.steps[-1]:,} of {steps:,}" if train.steps else "no step yet"
        return f"**Not finished**: {reached}. The command that started it goes on from its last checkpoint."
    model, rows = config.model, config.train.batch
    mixers = ", ".join(config.model.pattern or (config.model.attention.name,))
    trained = f"trained for {steps:,} steps of {rows} rows of {config.data.length} tokens"
    if not steps:
        trained = f"with the weights of `{config.train.init}`, not trained further"
    article = "An" if model.name[0] in "aeiou" else "A"
    return (
        f"{article} {model.name.replace('_', '-')} of {tables.count(result.get('parameters'))} weights "
        f"({model.layers} layers of width {model.width}, attention {mixers}) on `{config.data.source}`, "
        f"{trained}."
    )


def _results(result: Mapping[str, Any]) -> str:
    if not result:
        return ""
    quality, yardsticks = result.get("quality", {}), result.get("yardsticks", {})
    rows = [(f"held-out {name.replace('_', ' ')}", tables.number(value)) for name, value in quality.items()]
    rows[1:1] = [
        (YARDSTICKS.get(name, name.replace("_", " ")), tables.number(x)) for name, x in yardsticks.items()
    ]
    for name, (title, write) in MEASURES.items():
        if result.get(name, 0) is not None:  # None: a model of this kind has none
            rows.append((title, write(result.get(name))))
    if result.get("utilisation") is not None:
        ceiling = result["ceiling"]
        found = f"{result['utilisation']:.3g} of {tables.count(ceiling['flops_per_second'])}FLOP/s"
        rows.append(("model FLOPs utilisation", f"{found} ({ceiling['origin']})"))
    if "data_wait_fraction" in result:
        share = result["data_wait_fraction"]
        verdict = ": data is too slow" if share > SLOW_DATA else ""
        rows.append(("of training, waiting for data", f"{share:.1%}{verdict}"))
    if result.get("skipped_steps"):
        rows.append(("steps skipped (not finite, or a spike)", tables.number(result["skipped_steps"])))
    for back in result.get("rollbacks", ()):
        rows.append((f"went back at step {back['from']:,}", f"to step {back['to']:,}, past the bad batches"))
    signed = [f"{name}: `{text}`" for name, text in result.get("signatures", {}).items()]
    return "\n\n".join([tables.table(("measure", "value"), rows), *signed])


def _samples(result: Mapping[str, Any]) -> str:
    samples = result.get("samples", [])
    blocks = [f"{fence}text\n{text}\n{fence}" for text in samples for fence in [_fence(text)]]
    return "\n\n".join(["## Sample", *blocks]) if blocks else ""


def _fence(text: str) -> str:
    """Return backticks enough to fence a text that may hold fences itself."""
    fence = "```"
    while fence in text:
        fence += "`"
    return fence


def _origin(config: Any, result: Mapping[str, Any], workdir: Path) -> str:
    rows = [
        ("device", str(result.get("device", tables.NOT_RUN))),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())),
        ("commit", f"`{result['commit']}`" if result.get("commit") else tables.NOT_RUN),
        ("configuration, SHA-256", f"`{configuration.sha256(config)}`"),
        ("seed", str(config.seed)),
    ]
    text = "## Where it comes from\n\n" + tables.table(("", ""), [row for row in rows if row[1]])
    if result.get("command"):
        promise = "Made by (at that commit; the same machine gives the same losses to the bit):"
        text += f"\n\n{promise}\n\n```\n{result['command']}\n```"
    return text

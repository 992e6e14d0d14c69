"""An experiment folder: its config.py, read and checked, and the rows of its results.jsonl.

config.py holds a docstring with the parts of DOCSTRING_PARTS, ``ARMS`` (``{arm: its meaning in one
line}``; the first is the baseline), ``SEEDS``, ``get_config(arm)``, ``SMOKE`` (``{dotted key:
value}`` that make a run last seconds), ``CLAIMS`` (fastformer.report.claims) and, where the quality
to show is not bits per byte, ``QUALITY`` (a tuple of metrics such as "quality.accuracy").
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fastformer.core import config as configuration
from fastformer.core.errors import MALFORMED, UserError, nearest
from fastformer.report import claims

DOCSTRING_PARTS = ("Question", "Command", "Hardware", "Minutes", "Expectation", "Source")

LAYOUT = "sharding."  # keys that say where arrays lie: they change no result


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A folder whose config.py was read and checked.

    Attributes:
      path: the folder.
      about: the parts of the docstring, each in one line.
      arms: name -> meaning. seeds: of every arm.
      quality: the metrics that its table and picture show first.
      smoke: dotted key -> value, for the form that lasts seconds.
      claims: checked by every full run.
      overrides: dotted key -> value, what this form sets in every run: empty, or ``smoke``.
    """

    path: Path
    about: Mapping[str, str]
    arms: Mapping[str, str]
    seeds: tuple[int, ...]
    quality: tuple[str, ...]
    smoke: Mapping[str, Any]
    claims: tuple[claims.Claim, ...]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.path.name

    def config_argument(self, arm: str) -> str:
        """Return what follows ``--config=`` for an arm."""
        return f"{self.path / 'config.py'}:{arm}"

    def in_smoke(self) -> Experiment:
        """Return the form that lasts seconds: one seed, the overrides of SMOKE."""
        return dataclasses.replace(self, seeds=self.seeds[:1], overrides=self.smoke)

    def flags(self, seed: int) -> list[tuple[str, str]]:
        """Return the keys and values that the command line of a run sets."""
        return [(key, str(value)) for key, value in {"seed": seed, **self.overrides}.items()]

    def config(self, arm: str, seed: int) -> ConfigDict:
        """Return the configuration of one run.

        Raises:
          UserError: a key of SMOKE does not exist, or its value has the wrong type.
        """
        return configuration.load(self.config_argument(arm), self.flags(seed))


def read(folder: str | Path) -> Experiment:
    """Read and check the folder's config.py.

    Raises:
      UserError: there is no such folder, or its config.py lacks a part or names something unknown.
    """
    path = Path(folder)
    file = path / "config.py"
    if not file.is_file():
        roots = (path.parent, Path("experiments"))
        known = sorted({str(found.parent) for root in roots for found in root.glob("*/config.py")})
        listed = f" (experiments: {', '.join(known)})" if known else ""
        raise UserError(f"--experiment: no experiment in {folder}{nearest(str(path), known)}{listed}")
    module = configuration.load_module(str(file))
    for name in ("ARMS", "SEEDS", "SMOKE", "CLAIMS", "get_config"):
        if not hasattr(module, name):
            raise UserError(f"{file}: {name} is missing; fastformer/report/folder.py says what it must hold")
    for name, kind, example in (
        ("ARMS", dict, '{"softmax": "the baseline"}'), ("SEEDS", (tuple, list), "(1, 2, 3)"),
        ("SMOKE", dict, '{"train.steps": 2}'), ("CLAIMS", (tuple, list), "({...},)"),
    ):  # fmt: skip
        value = getattr(module, name)
        if not isinstance(value, kind) or name == "SMOKE" and not all(isinstance(key, str) for key in value):
            raise UserError(f"{file}: {name}, {value!r:.60}, is not allowed; it must be as {example}")
    for arm in module.ARMS:
        if not isinstance(arm, str) or not re.fullmatch(r"[\w.+]+(-[\w.+]+)*", arm):
            raise UserError(f"{file}: ARMS: {arm!r} is not allowed; a name has letters, digits, . _ + and -")
    for seed in module.SEEDS:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise UserError(f"{file}: SEEDS: {seed!r} is not allowed; it must be a whole number, 0 or more")
    if not module.ARMS or not module.SEEDS or len(set(module.SEEDS)) != len(module.SEEDS):
        raise UserError(f"{file}: ARMS and SEEDS must hold one entry or more, each once")
    quality = getattr(module, "QUALITY", ("quality.bits_per_byte",))
    if not isinstance(quality, (tuple, list)):
        raise UserError(f'{file}: QUALITY, {quality!r}, is not allowed; it must be as ("quality.accuracy",)')
    for metric in quality:
        claims.check_metric(metric, f"{file}: QUALITY")
    return Experiment(
        path=path,
        about=_about(module.__doc__ or "", file),
        arms=dict(module.ARMS),
        seeds=tuple(module.SEEDS),
        quality=tuple(quality),
        smoke=dict(module.SMOKE),
        claims=claims.parse(module.CLAIMS, module.ARMS, str(file)),
    )


def _about(docstring: str, file: Path) -> dict[str, str]:
    """Return ``{"Question": …}``: a part begins a line with its name and a colon, and ends at the next."""
    names = "|".join(DOCSTRING_PARTS)
    pieces = re.split(rf"^({names}):", docstring, flags=re.MULTILINE)
    about = {name: " ".join(text.split()) for name, text in zip(pieces[1::2], pieces[2::2])}
    for name in DOCSTRING_PARTS:
        if not about.get(name):
            raise UserError(f"{file}: its docstring has no line {name + ': …'!r}")
    return about


def row_of(arm: str, config: ConfigDict, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of results.jsonl for a run that ended with ``result``."""
    metrics = {name: result[name] for name in claims.RESULT_METRICS if result.get(name) is not None}
    metrics |= {f"quality.{name}": value for name, value in result.get("quality", {}).items()}
    origin = {name: result.get(name) for name in ("commit", "versions", "device")}
    made_with = {"config_sha256": result["config_sha256"], "config": configuration.flatten(config)}
    return {"arm": arm, "seed": config.seed, "metrics": metrics, **origin, **made_with}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a results.jsonl, oldest first.

    Raises:
      UserError: a line that is no row.
    """
    rows = []
    try:
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no text in UTF-8 ({error}); restore it") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            numbers, made_with = row["metrics"].values(), row.get("config", {})
            whole = isinstance(row["arm"], str) and isinstance(row["seed"], int)
            whole = whole and isinstance(row["config_sha256"], str) and isinstance(made_with, dict)
            whole = whole and all(isinstance(value, (int, float)) for value in numbers)
        except MALFORMED:
            whole = False
        if not whole:
            raise UserError(f"{file}, line {number}: is not a result; mend or remove it")
        rows.append(row)
    return rows


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append a row; the file's earlier lines stay as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row, sort_keys=True) + "\n")


def current(rows: Iterable[Mapping[str, Any]], experiment: Experiment) -> dict[tuple[str, int], dict]:
    """Return ``{(arm, seed): row}``: of the rows made with today's configuration, the newest of each.

    A row holds while every key that its configuration had, but for LAYOUT, has the same value today. A
    key that came later does not make it stale: its default is what the run did without it.
    """
    wanted = {
        (arm, seed): experiment.config(arm, seed) for arm in experiment.arms for seed in experiment.seeds
    }
    return {
        (row["arm"], row["seed"]): dict(row)
        for row in rows
        if (row["arm"], row["seed"]) in wanted and _holds(row, wanted[row["arm"], row["seed"]])
    }


def _holds(row: Mapping[str, Any], config: ConfigDict) -> bool:
    if row["config_sha256"] == configuration.sha256(config):
        return True
    today = json.loads(json.dumps(configuration.flatten(config)))
    absent = object()
    made_with = {key: value for key, value in row.get("config", {}).items() if not key.startswith(LAYOUT)}
    return bool(made_with) and all(today.get(key, absent) == value for key, value in made_with.items())

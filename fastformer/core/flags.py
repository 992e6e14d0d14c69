"""The flags of the command line: what they are, which go together, and the values of ``--config.<key>``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fastformer.core import launchers
from fastformer.core.errors import UserError, nearest

FROM_CONFIG = ("train", "prepare", "benchmark", "compile", "import")  # the others take a run's own
MODES = ("train", "prepare", "evaluate", "generate", "benchmark", "compile", "import", "export")
ASKED = {  # flags, their mode, and what they are
    "prompt": ("generate", "text to continue"),
    "source": ("generate", "text to translate, or @FILE of lines"),
    "question": ("generate", "to be answered from --context"),
    "context": ("generate", "text that holds the answer"),
    "sentence": ("generate", "text to compare with the others, two or more, or @FILE of lines"),
    "topology": ("compile", "TPUs to compile for, as v5e:16x16"),
    "weights": ("import", "a .gguf file, a Hugging Face directory, or the name of a model on its hub"),
    "format": ("export", "huggingface, gguf, gguf:q8_0, gguf:q4_0 or stablehlo"),
    "output": ("export", "a new folder"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> None:
        """Raise the message as the user's mistake."""
        raise UserError(message)


class Once(argparse.Action):
    """A flag that may be given once."""

    def __call__(
        self, parser: Parser, flags: argparse.Namespace, value: str, option: str | None = None
    ) -> None:
        """Keep the value, or raise where there is one."""
        if getattr(flags, self.dest) is not None:
            parser.error(f"{option}: is given twice")
        setattr(flags, self.dest, value)


def parser() -> Parser:
    """Return the parser of every flag but ``--config.<key>=<value>``."""
    p = Parser(
        prog="launch.py",
        description="Train, evaluate, sample and compare fast Transformers.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--config",
        action=Once,
        metavar="FILE[:ARM]",
        help="a file with get_config(), as in configs/quickstart.py",
    )
    p.add_argument("--mode", action=Once, choices=MODES, help="what to do (default: train)")
    p.add_argument("--workdir", action=Once, help="where the run lives (default: runs/<config name>)")
    for name, (mode, text) in ASKED.items():
        p.add_argument(f"--{name}", action="append", help=f"with --mode={mode}, as often as wanted: {text}")
    p.add_argument(
        "--experiment",
        action=Once,
        metavar="FOLDER",
        help="run all arms of an experiment that have no result yet",
    )
    p.add_argument("--smoke", action="store_true", help="with --experiment: a short form, written elsewhere")
    p.add_argument(
        "--launcher", action=Once, choices=launchers.LAUNCHERS, help="who starts config.distributed.processes"
    )
    p.epilog = "--config.<key>=<value> changes any key of the config; configs/base.py lists them all."
    return p


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Return the flags, and the overrides ``(key, value)`` in order.

    Raises:
      UserError: a flag that does not exist, or flags that do not go together.
    """
    p, overrides, rest, words = parser(), [], [], iter(argv)
    for word in words:
        found = re.match(r"--config\.([^=]*)(?:=(.*))?$", word, re.DOTALL)
        if not found:
            rest.append(word)
            continue
        value = found[2] if found[2] is not None else next(words, None)
        if not found[1] or value is None:
            raise UserError(f"{word}: needs a key and a value, as in --config.train.steps=100")
        overrides.append((found[1], value))
    flags, unknown = p.parse_known_args(rest)
    if unknown:
        name = unknown[0].partition("=")[0]
        hint = f"; did you mean --mode={name}?" if name in MODES else nearest(name, p._option_string_actions)
        raise UserError(f"{name}: no such flag{hint} (--help lists them)")
    for name in ("config", "workdir", "experiment"):
        if getattr(flags, name) == "":
            raise UserError(f"--{name}: is empty")
    if flags.smoke and not flags.experiment:
        raise UserError("--smoke: goes with --experiment=FOLDER")
    for name, (mode, _) in ASKED.items():
        if getattr(flags, name) and flags.mode != mode:
            raise UserError(f"--{name}: goes with --mode={mode}")
        if mode == "generate" and re.search("[\ud800-\udfff]", "".join(getattr(flags, name) or ())):
            raise UserError(f"--{name}: is not UTF-8")  # a path, of other modes, need not be
    if flags.launcher and flags.mode not in (None, "train"):
        raise UserError("--launcher: goes with --mode=train and --experiment")
    given = [key for key, _ in overrides if not (flags.launcher and key.startswith("distributed."))]
    if flags.experiment and (flags.config or flags.mode or flags.workdir or given):
        also = "--smoke, and --launcher with config.distributed, go with it"
        raise UserError(f"--experiment: takes its configuration from its folder; only {also}")
    return flags, overrides


def lines_of(values: Sequence[str]) -> list[str]:
    """Return the values, each ``@FILE`` replaced by the lines of the file.

    Raises:
      UserError: a file cannot be read, or holds nothing.
    """
    found = []
    for value in values:
        try:
            found += _lines(Path(value[1:])) if value[:1] == "@" else [value]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{value}: cannot be read as lines of UTF-8: {error}") from error
    return found


def _lines(path: Path) -> list[str]:
    text = path.read_text("utf-8")  # \r\n is read as \n; other characters that end lines are text
    if not text:
        raise UserError(f"@{path}: holds no line")
    return text.removesuffix("\n").split("\n")

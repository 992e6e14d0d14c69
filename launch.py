"""fastformer's command line: flags -> config -> one run. It only wires; README.md shows its uses."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fastformer.core import config as configuration
from fastformer.core.errors import UserError, nearest

FROM_CONFIG = ("train", "prepare", "benchmark", "compile", "import")  # the others take a run's own
ROOT = Path(__file__).resolve().parent
MODES = ("train", "prepare", "evaluate", "generate", "benchmark", "compile", "import", "export")
TOO_LARGE = (
    "out of memory; lower config.train.batch or config.data.length, or raise config.train.accumulate; "
    "config.model.remat=full keeps less"
)
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


def parser() -> Parser:
    """Return the parser of every flag but ``--config.<key>=<value>``."""
    p = Parser(
        prog="launch.py",
        description="Train, evaluate, sample and compare fast Transformers.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--config", metavar="FILE[:ARM]", help="a file with get_config(), as in configs/quickstart.py"
    )
    p.add_argument("--mode", choices=MODES, help="what to do (default: train)")
    p.add_argument("--workdir", help="where the run lives (default: runs/<config name>)")
    for name, (mode, text) in ASKED.items():
        p.add_argument(f"--{name}", action="append", help=f"with --mode={mode}, as often as wanted: {text}")
    p.add_argument(
        "--experiment", metavar="FOLDER", help="run all arms of an experiment that have no result yet"
    )
    p.add_argument("--smoke", action="store_true", help="with --experiment: a short form, written elsewhere")
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
        raise UserError(f"{name}: no such flag{nearest(name, p._option_string_actions)} (--help lists them)")
    if flags.smoke and not flags.experiment:
        raise UserError("--smoke: goes with --experiment=FOLDER")
    for name, (mode, _) in ASKED.items():
        if getattr(flags, name) and flags.mode != mode:
            raise UserError(f"--{name}: goes with --mode={mode}")
    if flags.experiment and (flags.config or flags.mode or flags.workdir or overrides):
        raise UserError("--experiment: takes its configuration from its folder; only --smoke goes with it")
    return flags, overrides


def lines_of(values: Sequence[str]) -> list[str]:
    """Return the values, each ``@FILE`` replaced by the lines of the file.

    Raises:
      UserError: a file cannot be read.
    """
    found = []
    for value in values:
        try:
            found += Path(value[1:]).read_text("utf-8").splitlines() if value[:1] == "@" else [value]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{value}: cannot be read as lines of UTF-8: {error}") from error
    return found


def run(argv: Sequence[str]) -> int:
    """Do what the flags say; return the exit code."""
    flags, overrides = parse(argv)
    if flags.experiment:
        from fastformer.report.experiment import run_experiment

        return run_experiment(flags.experiment, flags.smoke, Path(os.path.relpath(ROOT / "launch.py")))
    mode, config = flags.mode or "train", None
    if flags.config:
        config = configuration.load(flags.config, overrides)
    elif mode in FROM_CONFIG or not flags.workdir:
        also = "" if mode in FROM_CONFIG else ", or --workdir=DIR of a run"
        raise UserError(f"--mode={mode}: needs --config=FILE, as in --config=configs/quickstart.py{also}")
    workdir = Path(flags.workdir or f"runs/{config.name}")
    # What follows imports JAX, which takes seconds: a mistake in a flag or key is answered before.
    from fastformer.core import distributed
    from fastformer.train import modes

    if config is not None:
        distributed.join(config)
    if mode in ("evaluate", "generate"):
        config = modes.of_run(workdir, config, () if flags.config else overrides)
    asked = {name: getattr(flags, name) for name in ASKED}
    asked |= {name: lines_of(getattr(flags, name) or []) for name in ("source", "sentence")}
    modes.MODES[mode](config, workdir, {name: texts for name, texts in asked.items() if texts})
    return 0


def main() -> int:
    """Run, with the user's mistakes as one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(sys.argv[1:])
    except UserError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        return 0
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        print(f"launch.py: {TOO_LARGE} ({reason or 'MemoryError'})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

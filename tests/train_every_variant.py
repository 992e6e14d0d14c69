"""Train every causal row of the attention table on one task, generate with it, and show what came out.

    python tests/train_every_variant.py --workdir=runs/variants
    python tests/train_every_variant.py --workdir=runs/variants --names=local,gla -- --config.train.batch=2

What follows ``--`` goes to launch.py. A row that has its result is not trained again. Prints a Markdown
table; exit code 0 when every row lowered its loss and generated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastformer.attention import VARIANTS  # noqa: E402
from fastformer.report import tables  # noqa: E402

HEADERS = ("variant", "loss, first 10 steps", "last 10", "held-out bits per byte", "state", "tokens/s",
           "it writes")  # fmt: skip


def launch(*flags: str) -> str:
    """Return what launch.py printed."""
    command = [sys.executable, str(ROOT / "launch.py"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def row_of(name: str, workdir: Path, config: str, prompt: str, flags: list[str]) -> tuple[str, ...]:
    """Train and generate with one variant; return its line of the table.

    Raises:
      RuntimeError: it did not end well, its loss did not fall, or it generated nothing.
    """
    chosen = (f"--config.model.attention.name={name}", "--config.log.every=1")
    launch(f"--config={config}", f"--workdir={workdir}", *chosen, *flags)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    if not last < first:
        raise RuntimeError(f"the loss went from {first:.3f} to {last:.3f}")
    text = launch("--mode=generate", f"--workdir={workdir}", f"--prompt={prompt}").removeprefix(prompt)
    if not text.strip():
        raise RuntimeError("it generated nothing")
    result = json.loads((workdir / "result.json").read_text())
    sample = " ".join(text.split())[:40].replace("|", "¦").replace("`", "'")
    return (
        f"`{name}`",
        f"{first:.2f}",
        f"{last:.2f}",
        f"{result['quality']['bits_per_byte']:.3f}",
        tables.nbytes(result["state_bytes"]),
        f"{result['train_tokens_per_second']:,.0f}",
        f"`{sample}`",
    )


def main() -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--names", default="", help="rows, comma-separated; none is all causal ones")
    parser.add_argument("--prompt", default="def __init__(self, name")
    parser.add_argument("flags", nargs="*", help="of launch.py, after --")
    options = parser.parse_args()
    causal = [name for name, variant in VARIANTS.items() if variant.causal and variant.streaming]
    lines, good = [], True
    for name in options.names.split(",") if options.names else causal:
        try:
            workdir = (options.workdir / name).absolute()
            lines.append(row_of(name, workdir, options.config, options.prompt, options.flags))
            print(f"{name}: {lines[-1][2]} after {lines[-1][1]}", flush=True)
        except RuntimeError as error:
            good = False
            print(f"{name}: FAILED: {error}", flush=True)
    print(tables.table(HEADERS, lines))
    return good


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

"""Compile configs/pod.py for a pod of TPUs that is not here, for several mixers and lengths of row.

    python tests/pod_table.py
    python tests/pod_table.py --names=local,gla --arms=8k --topology=v5e:16x16 --workdir=runs/pod

Every one is compiled in a process of its own and kept in the workdir, so that the same command goes on where
it was stopped. Prints a Markdown table; exit code 0 when each compiled. Needs libtpu, and no TPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastformer.core import config as configuration  # noqa: E402
from fastformer.report import tables  # noqa: E402
from fastformer.report.roofline import Estimate  # noqa: E402
from fastformer.train.ahead import compile_for  # noqa: E402

HEADERS = (
    "mixer", "T", "mesh", "parameters", "weights, moments", "temporaries", "peak", "fits", "TFLOP", "useful",
    "sent", "a step", "of the peak useful",
)  # fmt: skip


def compile_one(path: Path, arm: str, name: str, topology: str) -> None:
    """Write what the step needs to ``path``."""
    config = configuration.load(str(ROOT / f"configs/pod.py:{arm}"), [("model.attention.name", name)])
    found = compile_for(config, topology)
    path.write_text(json.dumps(found | {"length": config.data.length}))


def row_of(name: str, found: dict) -> tuple[str, ...]:
    """Return the line of one mixer at one length, of each device."""
    fits = found["peak"] <= found["hbm"]
    flops, useful = (found[key] / found["devices"] / 1e12 for key in ("flops", "useful_flops"))
    row = [
        f"`{name}`", f"{found['length']:,}",
        " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1),
        tables.count(found["parameters"]),
        tables.nbytes(found["bytes"]["parameters"] + found["bytes"]["optimiser"]),
        tables.nbytes(found["temporaries"]) if "temporaries" in found else "",
        tables.nbytes(found["peak"]), "yes" if fits else "no", f"{flops:,.0f}", f"{useful:,.0f}",
    ]  # fmt: skip
    if "estimate" not in found:
        return (*row, "", "", "")
    e = Estimate(**found["estimate"])
    sent = tables.nbytes(sum(kind["bytes"] for kind in found["traffic"].values()))
    return (*row, sent, f"{e.best:.2f} to {e.worst:.2f} s, {e.bound}",
            f"{e.useful / e.worst:.0%} to {e.useful / e.best:.0%}")  # fmt: skip


def main() -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", default="softmax,local,gated_delta,mamba2")
    parser.add_argument("--arms", default="8k,32k,128k")
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs/pod")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        path, arm, name = options.one
        compile_one(Path(path), arm, name, options.topology)
        return True
    options.workdir.mkdir(parents=True, exist_ok=True)
    lines, good = [], True
    chosen, place = f"--topology={options.topology}", re.sub(r"\W", "_", options.topology)
    for arm, name in itertools.product(options.arms.split(","), options.names.split(",")):
        path = options.workdir / f"{place}-{arm}-{name}.json"
        if not path.exists():
            one = [sys.executable, __file__, chosen, "--one", str(path), arm, name]
            done = subprocess.run(one, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                good = False
                print(f"{name} {arm}: FAILED: {done.stderr.strip()[-600:]}", flush=True)
                continue
        lines.append(row_of(name, json.loads(path.read_text())))
        print(*lines[-1], sep="  ", flush=True)
    print(tables.table(HEADERS, lines))
    return good


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}  # others end in their bits

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALL = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
# Between slices TPUs send through their hosts.
_FAR = re.compile(r'= (.*?) send\(.*_xla_megascale_transfer_type="([\w-]+)"')
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?\[?[\d,\]<=\[]*\)?)? ?\{([^}]*)\}")
_COMPARE = re.compile(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=\"")  # channels of what is in no chain may be alike
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


class Traffic(NamedTuple):
    """What one kind of collective moves in a run of the program.

    Attributes:
      calls: of it.
      bytes: that one device sends, by a ring or its equal.
      far_bytes: of those, in groups that span slices.
    """

    calls: int = 0
    bytes: float = 0.0
    far_bytes: float = 0.0


def traffic(program: str, per_slice: int = 0) -> dict[str, Traffic]:
    """Return the traffic of each kind in the text of a compiled program, loops multiplied out.

    Args:
      program: what ``compiled.as_text()`` gives.
      per_slice: devices of a slice; 0 is all.

    Raises:
      ValueError: a collective stands in a loop whose number of turns the program does not tell.
    """
    lines, entry = _computations(program)
    parts: dict[tuple[str, str], tuple[int, float, float]] = {}
    for name, turns in _turns(lines, entry).items():
        for number, line in enumerate(lines[name]):
            hit, between = _COLLECTIVE.search(line), _FAR.search(line)
            if not hit and not between:
                continue
            if turns < 0:
                raise ValueError(f"{(hit or between)[2]} stands in a loop whose number of turns is not known")
            if between:
                sent = turns * sum(_nbytes(*array) for array in _SHAPE.findall(between[1])[:1])
                kind = between[2].lower().replace("_", "-")
                parts[kind, f"{name} {number}"] = (turns, sent, sent)
                continue
            groups, chain = _groups(line), _CHAIN.search(line)
            sent = turns * _sent(hit[2], hit[1], bool(hit[3]), groups.shape[1] if groups.size else 1)
            far = (
                per_slice and groups.size and bool(np.any(groups // per_slice != groups[:, :1] // per_slice))
            )
            # TPUs spread one collective over a chain of fusions that compute meanwhile, some of them in loops
            # within what it is sent for: each names it again. It is sent as often as the outermost runs.
            key = (hit[2], chain[1] if chain else f"{name} {number}")
            part = (turns, sent, sent if far else 0.0)
            parts[key] = min(parts.get(key, part), part)
    found: dict[str, Traffic] = {}
    for (kind, _), part in parts.items():
        found[kind] = Traffic(*map(sum, zip(found.get(kind, Traffic()), part)))
    return found


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    lines: dict[str, list[str]] = {}
    entry, name = "", None
    for line in program.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head[1]
            lines[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}":  # a kernel's own text may begin a line with more than that
            name = None
        elif name is not None:
            lines[name].append(line)
    return lines, entry


def _turns(lines: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Return how often each computation runs; below 0 where that is not known."""
    found: dict[str, int] = {}

    def visit(name: str, turns: int) -> None:
        if name not in lines:
            return
        found[name] = found.get(name, 0) + turns if turns >= 0 <= found.get(name, 0) else -1
        for line in lines[name]:
            for callee, times in _callees(line, lines):
                visit(callee, turns * times if times >= 0 <= turns else -1)

    visit(entry, 1)
    return found


def _callees(line: str, lines: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    times = _trips(line, lines) if " while(" in line else 1
    for name in _CALL.findall(line):
        yield name, times
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), times


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """Return the turns of a loop: as XLA noted, else of a counter from 0; -1 where neither can be read."""
    known, loop = _TRIPS.search(line), _LOOP.search(line)
    if known:
        return int(known[1])
    if not loop:
        return -1
    condition, body = ("\n".join(lines.get(name, ())) for name in loop.groups())
    compare = _COMPARE.search(condition)
    limit = dict(_CONSTANT.findall(condition)).get(compare[2]) if compare else None
    index = re.search(rf"{re.escape(compare[1])} = .* index=(\d+)", condition) if compare else None
    result = re.search(r"ROOT .* tuple\((.*)", body)
    if limit is None or not index or not result:
        return -1
    counter = re.findall(r"%([\w.\-]+)", result[1])[int(index[1])]
    add = re.search(rf"%{re.escape(counter)} = .* add\((.*?)\)", body)
    steps = dict(_CONSTANT.findall(body))
    step = [steps[name] for name in re.findall(r"%([\w.\-]+)", add[1]) if name in steps] if add else []
    return -(-int(limit) // int(step[0] if step else 1))


def _groups(line: str) -> np.ndarray:
    """Return the devices of each group, [groups, size]."""
    listed, iota, pairs = _LISTED.search(line), _IOTA.search(line), _PAIRS.search(line)
    if iota:
        shape, source = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(np.prod(source)).reshape(source)
        ids = ids.transpose([int(x) for x in iota[3].split(",")]) if iota[3] else ids
        return ids.reshape(shape[0], -1)
    mesh = _MESH.search(line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        used = re.findall(r"'(\w+)'", mesh[2])
        ids = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        order = [name for name in sizes if name not in used] + used
        ids = ids.transpose([list(sizes).index(name) for name in order])
        return ids.reshape(-1, int(np.prod([sizes[name] for name in used])))
    found = listed or pairs
    if not found:
        return np.zeros((0, 0), int)
    return np.asarray([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])


def _sent(kind: str, shape: str, start: bool, size: int) -> float:
    """Return the bytes that a device sends, from the shape of the result and the size of its group."""
    arrays = [_nbytes(dtype, dims) for dtype, dims in _SHAPE.findall(shape)]
    if start and kind != "all-reduce":  # its operands stand before its results, two counters behind
        arrays = [_nbytes(*array) for array in _SHAPE.findall(shape) if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    result = sum(arrays)
    share = (size - 1) / size if size else 0.0
    if kind == "all-reduce":
        return 2 * result * share
    if kind == "reduce-scatter":
        return result * (size - 1) if not start else result * share
    return result if kind == "collective-permute" else result * share


def _nbytes(dtype: str, dims: str) -> float:
    bits = re.search(r"\d+", dtype)
    width = WIDTHS.get(dtype) or (int(bits[0]) / 8 if bits else 0.0)
    return width * float(np.prod([int(x) for x in dims.split(",") if x], dtype=float))

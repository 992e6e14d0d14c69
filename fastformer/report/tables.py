"""Numbers and tables as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NOT_RUN = "not run"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])),
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with at least ``digits`` significant digits: "1.912", "12,345"; "not run" for None."""
    if value is None:
        return NOT_RUN
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{_decimals(value, digits)}f}"


def mean_std(values: Sequence[float]) -> str:
    """Return "mean ± std" (sample standard deviation), the mean alone for one value, "not run" for none.

    The deviation shows two significant digits and the mean as many decimals; values that are all
    equal are shown as one.
    """
    if not values:
        return NOT_RUN
    mean = statistics.fmean(values)
    if len(set(values)) == 1 or not all(map(math.isfinite, values)):
        return number(values[0] if len(set(values)) == 1 else mean)
    std = statistics.stdev(values)
    decimals = _decimals(std, 2)
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"


def nbytes(value: float | None) -> str:
    """Return a size such as "1.05 MB" (powers of 1000); "not run" for None."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: float | None) -> str:
    """Return a large count such as "851 k" or "10.4 G"; "not run" for None."""
    return _scaled(value, ("", "k", "M", "G", "T", "P")).rstrip()


def seconds(value: float | None) -> str:
    """Return a duration such as "48 s" or "3 min 20 s"; "not run" for None."""
    if value is None:
        return NOT_RUN
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _decimals(value: float, digits: int) -> int:
    """Return the decimals that show ``digits`` significant digits of a number."""
    if value == 0:
        return digits - 1
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return NOT_RUN
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    shown = f"{value:.0f}" if power == 0 and value == int(value) else f"{value:.3g}"
    return f"{shown} {units[power]}"

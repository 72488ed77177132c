"""How benchmarks print: a bar while they run, a table for people, one line of JSON for programs."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from minigen import cli
from minigen.ticking import ticking

DELAY = 2.0  # seconds before a bar appears


@contextlib.contextmanager
def bar(total: int, what: str, unit: str = "token", ticks: bool = True) -> Iterator[Any]:
    """A progress bar on standard error, where that is a terminal and it takes longer than `DELAY`.

    Its time goes on by itself, unless `ticks` is false: for what no other thread may disturb.
    """
    from tqdm import tqdm

    hidden = not cli.is_terminal(sys.stderr)
    # Bytes are many: in thousands and millions.
    options = {"unit": unit, "unit_scale": unit == "B", "delay": DELAY, "leave": False}
    with (
        tqdm(total=total, desc=what, disable=hidden, **options) as shown,
        ticking(shown) if ticks else contextlib.nullcontext(),
    ):
        yield shown


def number(value: Any) -> str:
    """Three significant digits, thousands whole; text as it is, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need, the first one to the left, the others to the right.

    An empty header is left out.
    """
    cells = [[number(value) for value in row] for row in ([header] if header else []) + [*rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def print_document(document: dict[str, Any]) -> None:
    """One line of JSON, floats cut to six significant digits."""
    print(json.dumps(_short(document), allow_nan=False), flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return value

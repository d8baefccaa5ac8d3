"""What the figures share: options, style, and how a picture and its numbers are written."""

import argparse
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dd.support.files import replacing
from dd.tracking.figures import DOTS_PER_INCH

FOLDER = Path("outputs/figures")
# Okabe-Ito, as in dd.tracking.figures: gradient descent, decoupled descent.
COLOURS = {"gd": "#D55E00", "dd": "#0072B2"}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}

Rows = Sequence[Mapping[str, Any]]


def options(doc: str, name: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that all figures have.

    Args:
        doc: says what is drawn.
        name: of the picture, without suffix.
        **defaults: of the options ``steps`` and, where there are several, ``trials``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=count, default=defaults["steps"], help="updates")
    if "trials" in defaults:
        parser.add_argument("--trials", type=count, default=defaults["trials"], help="repetitions")
    parser.add_argument("--lr", type=positive, default=0.25, help="learning rate")
    parser.add_argument("--seed", type=seed, default=0, help="of the first trial")
    parser.add_argument(
        "--out",
        type=picture,
        default=FOLDER / f"{name}.png",
        help="picture to write, .png or .pdf; its numbers go beside it, to .csv",
    )
    return parser


def count(text: str) -> int:
    """Read a positive integer of the command line."""
    return _number(text, int, "a positive integer", lambda value: value > 0)


def seed(text: str) -> int:
    """Read an integer of the command line that is not negative."""
    return _number(text, int, "an integer from 0", lambda value: value >= 0)


def positive(text: str) -> float:
    """Read a positive number of the command line."""
    return _number(text, float, "a positive number", lambda value: 0 < value < math.inf)


def picture(text: str) -> Path:
    """Read the path of a picture of the command line.

    Raises:
        ArgumentTypeError: if it is no picture that can be written.
    """
    path = Path(text)
    if path.suffix not in (".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png or .pdf, got {text!r}")
    return path


def _number(text: str, kind: type, expected: str, valid: Any) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


@contextmanager
def explained(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Have what the library says of numbers that do not go together said by the program."""
    try:
        yield
    except (FloatingPointError, ValueError) as error:
        parser.error(str(error))


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of so many inches, in the style of all figures."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Figure, path: Path, rows: Rows) -> None:
    """Write a picture, and its numbers beside it; each whole or not at all."""
    write_rows(path, rows)
    with replacing(path) as scratch:
        figure.savefig(scratch, format=path.suffix[1:], dpi=DOTS_PER_INCH)


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows of equal columns to the .csv file beside a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path.with_suffix(".csv")) as scratch,
        scratch.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Rows, path: Path) -> None:
    """Print rows of equal columns as a table, and where they were written."""
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    print(f"{path} and {path.with_suffix('.csv').name}")


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)

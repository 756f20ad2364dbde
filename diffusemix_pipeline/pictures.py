"""Pictures for people: contact sheets and plots, in one palette fit for colour-blind readers.

What belongs here: drawing from plain numbers and pixels. What does not: computing them, or knowing
what an arm or a stage is. The same input gives the same bytes: no dates, no software versions. Text
comes from file names and prompts: it is drawn as it is, never read as mathematics.

matplotlib takes a second to load, so it is imported where it is used, and never through pyplot,
whose figures are global.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

Interval = tuple[float, float, float]
"""A value, and the low and high end of its interval."""

_DOTS_PER_INCH = 192  # two dots a CSS pixel
_WIDTH = 4.8  # inches: legible on a phone without zooming
_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.", ":")
_NAMED_CLASSES = 60  # more bars than these are drawn without names
_LEVEL_LABEL = 3  # letters: longer names of columns are turned
_LONGEST_LABEL = 28  # characters
_LEGEND_LINES = 4  # what a figure has room for
_LEGEND_LINE_INCHES = 0.18
_TURNED_INCHES = 0.05  # that a character of a turned label takes below the cells
_LARGEST_NUMBER = 9.0  # points, of the numbers in cells
_SMALLEST_NUMBER = 5.0
_LEAST_SHARE = 0.01  # of the images: bins with fewer say nothing of calibration


@dataclass(frozen=True)
class Theme:
    """Colours for one background. `series` are Okabe and Ito's, fit for colour-blind readers."""

    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    muted="#5b6470",
    grid="#e3e6ea",
    series=("#5b6470", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
DARK = Theme(
    paper="#171a1f",
    ink="#e8eaed",
    muted="#a0a8b3",
    grid="#2d333b",
    series=("#c9d1d9", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2"),
)


# Contact sheets


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 96,
) -> bytes:
    """Return a PNG of uint8 (H, W, 3) images in rows, with labels above and to the left of them.

    An image fills a square of `cell` px as far as its shape allows; its pixels stay visible squares
    when it is enlarged. Long labels wrap, and the sheet grows for them.
    """
    from PIL import Image, ImageDraw

    font, gap = _label_font(max(12, cell // 8)), max(4, cell // 16)
    beside = [_wrapped(label, font, 2 * cell) for label in row_labels]
    above = [_wrapped(label, font, cell) for label in column_labels]
    left = max((_text_size(text, font)[0] for text in beside), default=-gap) + gap
    top = max((_text_size(text, font)[1] for text in above), default=-gap) + gap
    heights = [cell] * len(rows)
    for index, text in enumerate(beside):
        heights[index] = max(cell, _text_size(text, font)[1])
    columns = max(map(len, rows), default=0)
    width = gap + left + columns * (cell + gap)
    height = gap + top + sum(heights) + gap * len(rows)
    sheet = Image.new("RGB", (width, height), LIGHT.paper)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(above):
        centre = gap + left + column * (cell + gap) + cell // 2
        draw.multiline_text(
            (centre, gap + top - gap), text, LIGHT.ink, font, anchor="md", align="center"
        )
    y = gap + top
    for index, row in enumerate(rows):
        middle = y + heights[index] // 2
        if index < len(beside):
            draw.multiline_text(
                (left, middle), beside[index], LIGHT.ink, font, anchor="rm", align="right"
            )
        for column, pixels in enumerate(row):
            image = _fitted(Image.fromarray(pixels), cell)
            x = gap + left + column * (cell + gap)
            sheet.paste(image, (x + (cell - image.width) // 2, middle - image.height // 2))
        y += heights[index] + gap
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _fitted(image: "Image.Image", cell: int) -> "Image.Image":
    from PIL import Image

    enlarge = -(-cell // max(image.size))
    if enlarge > 1:
        larger = image.width * enlarge, image.height * enlarge
        image = image.resize(larger, Image.Resampling.NEAREST)
    factor = cell / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.BOX)


def _label_font(size: int) -> "FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.truetype(_font_file(), size)


def _font_file() -> str:
    """Return matplotlib's own font, which plots are drawn with, too."""
    from matplotlib import get_data_path

    return f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"


def _text_size(text: str, font: "FreeTypeFont") -> tuple[int, int]:
    from PIL import Image, ImageDraw

    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, right, bottom = draw.multiline_textbbox((0, 0), text, font, anchor="la")
    return int(right + 1), int(bottom + 1)


def _wrapped(text: str, font: "FreeTypeFont", width: int) -> str:
    """Break `text` into lines of at most `width` px: between words, or within one too long."""
    lines = [""]
    for word in _plain(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(line for line in lines if line)


def _plain(text: str) -> str:
    """Replace what cannot be drawn on one line.

    Characters that the font lacks, as those of Chinese, are transliterated, whatever other fonts a
    machine has; control characters and halves of surrogate pairs have no other form.
    """
    from anyascii import anyascii

    known = _characters()

    def drawn(character: str) -> str:
        if not character.isprintable():
            return "\ufffd"
        return character if ord(character) in known else anyascii(character) or "\ufffd"

    return "".join(map(drawn, text))


@cache
def _characters() -> frozenset[int]:
    """Return the code points that the font of all labels has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


# Plots


def class_histogram(counts: Mapping[str, Mapping[str, int]], *, theme: Theme = LIGHT) -> bytes:
    """Return a PNG of how many images each class has: `counts` is split -> class -> images.

    Classes keep their order; of more than 60, the bars stand by size and go without names.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    classes = list(dict.fromkeys(name for split in counts.values() for name in split))
    named = len(classes) <= _NAMED_CLASSES
    if not named:
        classes.sort(key=lambda name: -sum(split.get(name, 0) for split in counts.values()))
    figure, axes = _figure(theme, height=min(12.0, 0.9 + 0.22 * len(classes)) if named else 3.5)
    start = np.zeros(len(classes))
    for index, (split, of_class) in enumerate(counts.items()):
        images = np.array([of_class.get(name, 0) for name in classes])
        style: dict[str, Any] = {
            "color": theme.series[(index + 1) % len(theme.series)],
            "label": _escaped(split),
        }
        axes.barh(range(len(classes)), images, 0.72, left=start, **style)
        start = start + images
    axes.set_yticks(range(len(classes)) if named else [])
    if named:
        axes.set_yticklabels([_named(name) for name in classes])
    else:
        axes.set_ylabel(f"{len(classes)} classes, by size", color=theme.muted)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("images", color=theme.muted)
    _legend_above(figure, axes, theme)
    return _png(figure)


def learning_curves(curves: "Mapping[str, pd.DataFrame]", *, theme: Theme = LIGHT) -> bytes:
    """Return a PNG of training: `curves` is arm -> columns step, train_loss and val_accuracy.

    Accuracies are 0 to 1. A value that was not measured at a step is NaN.
    """
    figure, _ = _figure(theme, height=4.6)
    figure.clear()
    panels = figure.subplots(2, 1, sharex=True)
    for axes, column, label in zip(
        panels, ("train_loss", "val_accuracy"), ("training loss", "accuracy on val"), strict=True
    ):
        _style(axes, theme)
        for index, (name, curve) in enumerate(curves.items()):
            known = curve.dropna(subset=[column])
            line = _line_style(index, theme, marked=column == "val_accuracy")
            axes.plot(known["step"], known[column], label=_named(name), **line)
        axes.set_ylabel(label, color=theme.muted)
    panels[1].yaxis.set_major_formatter(_percent)
    panels[1].set_xlabel("optimiser step", color=theme.muted)
    _legend_above(figure, panels[0], theme)
    return _png(figure)


def accuracy_curves(
    strengths: Sequence[float],
    accuracies: Mapping[str, Sequence[Interval]],
    *,
    label: str,
    theme: Theme = LIGHT,
) -> bytes:
    """Return a PNG of each arm's accuracy (0 to 1) and its interval over `strengths`.

    These stand evenly spaced, so that none covers another, whatever their ratios.
    """
    figure, axes = _figure(theme, height=3.4)
    places = range(len(strengths))
    for index, (name, intervals) in enumerate(accuracies.items()):
        value, low, high = np.array(intervals).T
        line = _line_style(index, theme, marked=True)
        axes.fill_between(places, low, high, color=line["color"], alpha=0.16, linewidth=0)
        axes.plot(places, value, label=_named(name), **line)
    axes.set_xticks(places, [f"{strength:g}" for strength in strengths])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel(label, color=theme.muted)
    axes.set_ylabel("accuracy", color=theme.muted)
    _legend_above(figure, axes, theme)
    return _png(figure)


def heat_map(
    values: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    label: str,
    row_label: str = "",
    reach: float | None = None,
    better: np.ndarray | None = None,
    theme: Theme = LIGHT,
) -> bytes:
    """Return a PNG of `values` (rows, columns) as coloured cells, numbered in percent or points.

    Values are 0 to 1, the bluer the higher; with `reach`, differences, coloured from -reach, orange
    for worse, over a neutral 0, which has no number, to reach, blue for better. `better` holds 1
    where a higher value is better and -1 where it is worse; None: better everywhere.
    """
    rows, columns = values.shape
    longest = min(_LONGEST_LABEL, max(len(name) for name in column_labels))
    turned = longest > _LEVEL_LABEL
    below = _TURNED_INCHES * longest if turned else 0
    figure, axes = _figure(theme, height=0.95 + 0.36 * rows + below)

    def numbered(value: float, digits: int) -> str:
        if reach is None:
            return f"{100 * value:.0f}"
        return f"{100 * value:+z.{digits}f}".replace("-", "−") if value else ""

    coloured = values if better is None else values * better
    _cells(axes, values, coloured, row_labels, numbered, _scale(reach, theme), theme)
    how: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(
        range(columns), [_named(name) for name in column_labels], **(how if turned else {})
    )
    axes.set_xlabel(label, color=theme.muted)
    axes.set_ylabel(row_label, color=theme.muted)
    # Over the whole picture, as long names of rows leave little room over the cells.
    figure.suptitle(_escaped(title), color=theme.ink, size=10, weight="bold", x=0.01, ha="left")
    return _png(figure)


def _scale(reach: float | None, theme: Theme) -> "tuple[Colormap, Normalize]":
    """Return the colours of shares, 0 to 1, or of differences from -reach to reach."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    if reach is None:
        ends = (theme.grid, theme.series[1])
        return LinearSegmentedColormap.from_list("share", ends), Normalize(0, 1)
    both = ("#d55e00", theme.grid, "#0072b2")
    return LinearSegmentedColormap.from_list("worse to better", both), Normalize(-reach, reach)


def _cells(
    axes: "Axes",
    values: np.ndarray,
    coloured: np.ndarray,
    row_labels: Sequence[str],
    numbered: Callable[[float, int], str],
    scale: "tuple[Colormap, Normalize]",
    theme: Theme,
) -> None:
    """Draw `values` (rows, columns) as cells with names of rows, coloured by `coloured`.

    Each finite value is written into its cell by `numbered`, which takes it and how many decimals
    there are, as large as the cells are wide; where they are too narrow, none is.
    """
    colours, norm = scale
    axes.imshow(coloured, cmap=colours, norm=norm, aspect="auto")
    rows, columns = values.shape
    axes.set_yticks(range(rows), [_named(name) for name in row_labels])
    beside = 0.075 * min(_LONGEST_LABEL, max(map(len, row_labels))) + 0.3  # inches; of 9 points
    for digits in (1, 0):
        texts = [numbered(value, digits) for value in values.flat if np.isfinite(value)]
        letters = max(map(len, texts), default=1) or 1
        size = min(_LARGEST_NUMBER, 0.9 * (_WIDTH - beside) / columns * 72 / (0.62 * letters))
        if size >= 0.8 * _LARGEST_NUMBER:
            break
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and size >= _SMALLEST_NUMBER:
            ink = _ink_on(colours(norm(coloured[row, column]))[:3])
            where = {"ha": "center", "va": "center", "size": size}
            axes.text(column, row, numbered(value, digits), color=ink, **where)
    axes.set_xticks(np.arange(1, columns) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, rows) - 0.5, minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", color=theme.paper, linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _ink_on(colour: Sequence[float]) -> str:
    """Return black or white, whichever stands out more from sRGB in 0 to 1 (WCAG 2.2)."""
    srgb = np.asarray(colour)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def yield_map(table: "pd.DataFrame") -> bytes:
    """Return a PNG of shares, 0 to 1, in percent: `table` has a row a class, a column a prompt.

    A cell without a share (NaN) stays empty. Of more than 60 classes, the 60 with the lowest mean
    are drawn, lowest first.
    """
    classes, prompts = table.shape
    label = "edits let through, %"
    if classes > _NAMED_CLASSES:
        lowest = table.mean(axis=1).sort_values(kind="stable").index[:_NAMED_CLASSES]
        table = table.loc[lowest]
        label += f": the {_NAMED_CLASSES} lowest of {classes} classes"
    values = table.to_numpy(float)
    figure, axes = _figure(LIGHT, height=1.6 + 0.24 * len(table))
    names = [str(name) for name in table.index]
    _cells(
        axes, values, values, names, lambda value, _: f"{100 * value:.0f}", _scale(None, LIGHT),
        LIGHT,
    )  # fmt: skip
    axes.xaxis.tick_top()
    axes.set_xticks(
        range(prompts), [_named(str(name)) for name in table.columns],
        rotation=45, ha="left", rotation_mode="anchor",
    )  # fmt: skip
    axes.tick_params(labelsize=8)
    axes.set_xlabel(label, color=LIGHT.muted)
    return _png(figure)


def reliability_diagram(curves: "Mapping[str, pd.DataFrame]", *, theme: Theme = LIGHT) -> bytes:
    """Return a PNG of accuracy over confidence, and of how many images have which confidence.

    A mark is larger where it stands for more images, and bins with less than a hundredth of them
    have none.

    `curves` is arm -> a row a bin, with columns confidence and accuracy (0 to 1, NaN in an empty
    bin) and share (of the images, 0 to 1).
    """
    figure, _ = _figure(theme, height=4.9)
    figure.clear()
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _style(top, theme)
    _style(bottom, theme)
    top.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle=(0, (2, 3)))
    for index, (name, curve) in enumerate(curves.items()):
        known = curve[curve["share"] >= _LEAST_SHARE].dropna()
        line = _line_style(index, theme, marked=False)
        marker, sizes = _MARKERS[index % len(_MARKERS)], 8 + 90 * known["share"]
        top.plot(known["confidence"], known["accuracy"], label=_named(name), **line)
        top.scatter(
            known["confidence"], known["accuracy"], sizes, line["color"], marker=marker, zorder=3
        )
        edges = np.linspace(0, 1, len(curve) + 1)
        bottom.stairs(curve["share"], edges, color=line["color"], linestyle=line["linestyle"])
    top.set_ylabel("accuracy", color=theme.muted)
    bottom.set_ylabel("share of\nimages", color=theme.muted)
    bottom.set_xlabel("confidence of the prediction", color=theme.muted)
    for axis in (top.yaxis, bottom.yaxis, bottom.xaxis):
        axis.set_major_formatter(_percent)
    _legend_above(figure, top, theme)
    return _png(figure)


def differences(
    intervals: Mapping[str, Mapping[str, Interval]],
    significant: Collection[tuple[str, str]],
    *,
    label: str,
    theme: Theme = LIGHT,
) -> bytes:
    """Return a PNG of differences and their intervals around a line at 0.

    `intervals` is measure -> arm -> interval. Values are -1 to 1 and drawn in points, hollow but
    for those of `significant`, by measure and arm. With several arms, each has a line of its own
    below its measure.
    """
    several = max(len(of_arm) for of_arm in intervals.values()) > 1
    rows: list[tuple[str, int, Interval | None, bool]] = []
    for measure, of_arm in intervals.items():
        if several:
            rows.append((measure, 0, None, False))
        for index, (arm, interval) in enumerate(of_arm.items(), 1):
            name, filled = arm if several else measure, (measure, arm) in significant
            rows.append((name, index, interval, filled))
    figure, axes = _figure(theme, height=1.0 + (0.24 if several else 0.5) * len(rows))
    axes.axvline(0, color=theme.ink, linewidth=1)
    for y, (_, index, drawn, filled) in enumerate(rows):
        if drawn is None:
            continue
        value, low, high = (100 * number for number in drawn)
        style = _line_style(index, theme, marked=True)
        fill = style["color"] if filled else theme.paper
        axes.plot([low, high], [y, y], color=style["color"], linewidth=2, solid_capstyle="butt")
        axes.plot(
            value, y, style["marker"], color=style["color"], markerfacecolor=fill, markersize=6
        )
    axes.set_yticks(range(len(rows)), [_named(row[0]) for row in rows])
    for tick, (_, _, drawn, _) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if several and drawn is None else "normal")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label, color=theme.muted)
    return _png(figure)


def _figure(theme: Theme, *, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, height), dpi=_DOTS_PER_INCH, layout="constrained")
    figure.set_facecolor(theme.paper)
    axes = figure.subplots()
    _style(axes, theme)
    return figure, axes


def _style(axes: "Axes", theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, labelsize=9, length=0, pad=5)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def _line_style(index: int, theme: Theme, *, marked: bool) -> dict[str, Any]:
    style: dict[str, Any] = {
        "color": theme.series[index % len(theme.series)],
        "linestyle": _LINES[index % len(_LINES)],
        "linewidth": 1.8,
    }
    if marked:
        style |= {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4.5}
    return style


def _legend_above(figure: "Figure", axes: "Axes", theme: Theme) -> None:
    """Explain the lines over the whole figure, which grows where they are many."""
    handles, labels = axes.get_legend_handles_labels()
    columns = _legend_columns(labels)
    more_lines = -(-len(labels) // columns) - _LEGEND_LINES
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE_INCHES * max(0, more_lines))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9,
        labelcolor=theme.ink, handlelength=2.4, columnspacing=1.4,
    )  # fmt: skip


def _legend_columns(labels: Sequence[str]) -> int:
    """Return how many columns of a legend, three at most, fit side by side."""
    em = round(9 / 72 * _DOTS_PER_INCH)  # px; 9 points
    font = _label_font(em)
    for columns in (3, 2):
        parts = [part for part in np.array_split(np.array(labels), columns) if len(part)]
        names = sum(max(map(font.getlength, part)) for part in parts)
        beside = 3.2 * len(parts) + 1.4 * (len(parts) - 1) + 1  # lines, gaps and the margin; em
        if names + beside * em <= _WIDTH * _DOTS_PER_INCH:
            return columns
    return 1


def _percent(value: float, _position: float) -> str:
    return f"{100 * value:.0f} %"


def _escaped(text: str) -> str:
    """Keep matplotlib from reading dollars as mathematics, a leading underscore as 'no legend'."""
    text = _plain(text).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _named(text: str) -> str:
    return _escaped(shortened(_plain(text)))


def shortened(name: str) -> str:
    """Cut a name in its middle to what a plot has room for: names differ at either end."""
    half = (_LONGEST_LABEL - 1) // 2
    return name if len(name) <= _LONGEST_LABEL else f"{name[:half]}…{name[-half:]}"


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

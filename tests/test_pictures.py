"""Pictures: sizes and pixels of sheets, the same bytes twice, and hostile text."""

import io
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffusemix_pipeline import pictures

HOSTILE = ["$\\frac{1}$", "_hidden", "a\nb\x00", "\udcff", "<b>", "x" * 200, ""]
CURVE = pd.DataFrame(
    {"step": [1, 2, 3], "train_loss": [2.0, 1.5, 1.0], "val_accuracy": [np.nan, 0.4, 0.6]}
)
BINS = pd.DataFrame(
    {"confidence": [np.nan, 0.5, 0.9], "accuracy": [np.nan, 0.4, 0.95], "share": [0.0, 0.3, 0.7]}
)

# What a dichromat sees, in linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
REPORT = Path(pictures.__file__).parent / "evaluation" / "report.html.jinja"


def linear(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIE L*a*b* of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], LUMINANCE, [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ rgb.clip(0, 1) / to_xyz.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    low, high = sorted(LUMINANCE @ linear(colour) + 0.05 for colour in (one, other))
    return high / low


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("theme", [pictures.LIGHT, pictures.DARK], ids=["light", "dark"])
def test_lines_differ_for_colour_blind_readers_too(theme, kind):
    seen = [lab(VISION[kind] @ linear(colour)) for colour in theme.series]
    nearest = min(np.linalg.norm(one - other) for one, other in combinations(seen, 2))
    assert nearest > 15  # 2 is what a trained eye tells apart side by side


@pytest.mark.parametrize("theme", [pictures.LIGHT, pictures.DARK], ids=["light", "dark"])
def test_words_in_plots_stand_out(theme):
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    assert min(contrast(theme.paper, words) for words in (theme.ink, theme.muted)) > 4.5


@pytest.mark.parametrize("theme", [pictures.LIGHT, pictures.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("reach", [None, 0.3])
def test_numbers_stand_out_on_every_colour_of_a_map(theme, reach):
    colours, norm = pictures._scale(reach, theme)
    inks = {"black": "#000000", "white": "#ffffff"}
    for value in np.linspace(norm.vmin, norm.vmax, 200):
        red, green, blue = (round(255 * part) for part in colours(norm(value))[:3])
        ink = inks[pictures._ink_on((red / 255, green / 255, blue / 255))]
        assert contrast(f"#{red:02x}{green:02x}{blue:02x}", ink) > 4.5


@pytest.mark.parametrize(("better", "colour"), [(1, "#0072b2"), (-1, "#d55e00"), (None, "#0072b2")])
def test_what_is_better_is_blue_and_what_is_worse_orange(better, colour):
    values = np.full((1, 1), 0.3)
    how = None if better is None else np.full((1, 1), better)
    png = pictures.heat_map(values, ["a"], ["b"], title="", label="", reach=0.3, better=how)
    shown = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    assert (pixels_of(png) == shown).all(axis=2).mean() > 0.1


@pytest.mark.parametrize(("name", "drawn"), [("猫", "Mao"), ("किताब", "kitab"), ("🍕", ":pizza:")])
@pytest.mark.filterwarnings("error:Glyph")
def test_what_the_font_lacks_is_transliterated(name, drawn):
    grey = np.full((8, 8, 3), 99, np.uint8)
    for draw in (
        lambda text: pictures.class_histogram({"train": {text: 3}}),
        lambda text: pictures.contact_sheet([[grey]], row_labels=[text]),
    ):
        assert draw(name) == draw(drawn)


@pytest.mark.filterwarnings("error:Glyph")
def test_what_the_font_has_is_drawn_as_it_is():
    assert pictures._plain("Übung, кошка, γάτα, قطة") == "Übung, кошка, γάτα, قطة"


def test_strengths_stand_evenly_whatever_their_ratios():
    def drawn(strengths: list[float]) -> np.ndarray:
        curve = {"arm": [(0.5, 0.4, 0.6)] * len(strengths)}
        picture = pixels_of(pictures.accuracy_curves(strengths, curve, label="strength"))
        return picture[: picture.shape[0] // 2]  # above the numbers of the axis

    assert (drawn([1, 2, 3]) == drawn([1, 2, 9])).all()


def test_words_in_the_report_stand_out_on_screen_and_on_paper():
    pages = re.findall(r":root \{(.*?)\}", REPORT.read_text("utf-8"), flags=re.S)
    assert len(pages) == 3
    for page in pages:
        colours = dict(re.findall(r"--(\w+): (#\w+)", page))
        colours = {
            name: colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
            for name, colour in colours.items()
        }
        for words in ("ink", "muted", "accent", "better", "worse"):
            for paper in ("paper", "raised"):
                assert contrast(colours[paper], colours[words]) > 4.5, (paper, words)


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_importing_pictures_loads_neither_matplotlib_nor_pandas():
    code = (
        "import sys, diffusemix_pipeline.pictures; print({'matplotlib', 'pandas'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_sheet_enlarges_pixels_to_squares_and_keeps_the_order():
    checks = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
    black = np.zeros((8, 8, 3), np.uint8)
    sheet = pixels_of(pictures.contact_sheet([[checks, black], [black]], cell=32))
    gap = 4
    assert sheet.shape == (2 * 32 + 3 * gap, 2 * 32 + 3 * gap, 3)
    first = sheet[gap : gap + 32, gap : gap + 32]
    assert (first == checks.repeat(16, axis=0).repeat(16, axis=1)).all()
    assert (sheet[gap : gap + 32, gap + 36 : gap + 68] == 0).all()
    assert (sheet[gap + 36 : gap + 68, gap + 36 : gap + 68] == 255).all()  # an empty place


def test_a_wide_image_keeps_its_shape():
    wide = np.zeros((20, 60, 3), np.uint8)
    sheet = pixels_of(pictures.contact_sheet([[wide]], cell=96))
    rows, columns = np.nonzero((sheet == 0).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (32, 96)


def test_labels_are_not_clipped():
    """Ink reaches no edge: the outermost pixels are paper."""
    grey = np.full((32, 32, 3), 200, np.uint8)
    labels = ["a transformed version of an image", "W" * 60, "gjpqy"]
    png = pictures.contact_sheet([[grey] * 3] * 3, row_labels=labels, column_labels=labels)
    sheet = pixels_of(png)
    for edge in (sheet[:2], sheet[-2:], sheet[:, :2], sheet[:, -2:]):
        assert (edge == 255).all()


def draw_everything(text: list[str], theme: pictures.Theme = pictures.LIGHT) -> list[bytes]:
    image = np.zeros((4, 4, 3), np.uint8)
    interval = (0.1, -0.2, 0.3)
    some = text[:3]
    classes, prompts = (pd.Index(names, dtype=object) for names in (text, text[:2]))
    shares = pd.DataFrame([[0.5, np.nan]] * len(text), classes, prompts)
    return [
        pictures.contact_sheet([[image]] * len(text), row_labels=text, column_labels=text[:1]),
        pictures.class_histogram({"train": dict.fromkeys(text, 3)}, theme=theme),
        pictures.class_histogram({"train": {f"{n}": n for n in range(200)}}, theme=theme),
        pictures.learning_curves(dict.fromkeys(some, CURVE), theme=theme),
        pictures.accuracy_curves(
            [1, 2], {name: [(0.5, 0.4, 0.6)] * 2 for name in some}, label="ε", theme=theme
        ),
        pictures.heat_map(np.eye(3), some, some, title=text[0], label="severity", theme=theme),
        pictures.heat_map(-np.eye(3), some, some, title="t", label="l", reach=1, theme=theme),
        pictures.yield_map(shares),
        pictures.yield_map(pd.DataFrame(np.eye(200, 40))),
        pictures.reliability_diagram(dict.fromkeys(some, BINS), theme=theme),
        pictures.differences(
            {name: {"arm": interval} for name in some}, {(some[0], "arm")}, label="l", theme=theme
        ),
    ]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_text_is_drawn_and_twice_the_same_with_no_software_or_time():
    drawn = draw_everything(HOSTILE)
    assert drawn == draw_everything(HOSTILE)
    for png in drawn:
        assert set(Image.open(io.BytesIO(png)).info) <= {"dpi"}


def test_the_page_colour_is_the_themes():
    for theme in (pictures.LIGHT, pictures.DARK):
        plot = pixels_of(pictures.learning_curves({"vanilla": CURVE}, theme=theme))
        assert tuple(plot[0, 0]) == tuple(bytes.fromhex(theme.paper[1:]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("arms", [2, 6, 36])
def test_arms_of_long_names_leave_room_for_what_is_drawn(arms):
    """matplotlib warns where names take all the room of the axes."""
    names = [f"{number} {'W' * 60}" for number in range(arms)]
    points = {arm: [(0.5, 0.4, 0.6)] * 2 for arm in names}
    pictures.learning_curves(dict.fromkeys(names, CURVE))
    pictures.accuracy_curves([1, 2], points, label="ε")
    pictures.reliability_diagram(dict.fromkeys(names, BINS))
    intervals = dict.fromkeys(names, (0.1, -0.2, 0.3))
    pictures.differences({"Clean": intervals}, set(), label="points")
    pictures.heat_map(np.eye(15, arms), "abcdefghijklmno", names, title="t", label="")


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (["Vanilla", "DiffuseMix"], 3),
        (["DiffuseMix + CutMix"] * 6, 2),
        (["W" * 28] * 2, 1),
        (["Vanilla"], 3),
    ],
)
def test_a_legend_has_as_many_columns_as_fit(labels, columns):
    assert pictures._legend_columns(labels) == columns

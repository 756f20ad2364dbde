"""The report: its numbers, its words, its schema, its safety, and the same bytes twice."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest

from diffusemix_pipeline import pictures
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.calibration import expected_calibration_error
from diffusemix_pipeline.evaluation.changes import changes, read_document
from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.report import ReportInputs, write_report
from diffusemix_pipeline.evaluation.written_report import MEASURES, Report, read_report, title_of
from diffusemix_pipeline.settings import ARMS, Settings

IMAGES = 200
SETTINGS = Settings.model_validate({"evaluation": {"bootstrap_samples": 1000}})
CURVE = pd.DataFrame({"step": [5, 10], "train_loss": [2.0, 1.0], "val_accuracy": [0.3, 0.6]})
HOSTILE = "<script>alert('x')</script>\"'&amp;$a$"


def evidence(clean: float, fgsm: float, corrupted: float, seed: int = 0) -> Evidence:
    """Return evidence in which the first images are right, as many as the shares say."""
    labels = np.arange(IMAGES) % 4
    right = np.arange(IMAGES) < clean * IMAGES
    answers = np.where(right, labels, (labels + 1) % 4)
    sure = np.random.default_rng(seed).uniform(0.5, 1, IMAGES)
    probabilities = np.full((IMAGES, 4), ((1 - sure) / 3)[:, None].repeat(4, axis=1))
    probabilities[np.arange(IMAGES), answers] = sure
    attacked = np.arange(IMAGES) < fgsm * IMAGES
    return Evidence(
        ids=tuple(map(str, range(IMAGES))),
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        epsilons=(1.0, 2.0, 8.0),
        fgsm=np.stack([right, attacked, np.zeros(IMAGES, bool)]),
        attack_epsilon=8.0,
        attacked=np.arange(40),
        pgd=np.arange(40) < 20 * clean,
        autoattack=np.zeros(10, bool),
        corruptions=("contrast", "fog"),
        severities=(1, 5),
        corrupted=np.broadcast_to(np.arange(IMAGES) < corrupted * IMAGES, (2, 2, IMAGES)),
        published_sets=(),
        published=np.zeros((0, 0), bool),
    )


def inputs(**changed) -> ReportInputs:
    """Return a comparison in which DiffuseMix gains on corruptions, loses on FGSM, and no more."""
    given = ReportInputs(
        evidence={
            ("vanilla", 0): evidence(0.8, 0.6, 0.4),
            ("diffusemix", 0): evidence(0.8, 0.4, 0.7, seed=1),
        },
        classes=["a", "b", "c", "d"],
        settings=SETTINGS,
        counts={"train": dict.fromkeys("abcd", 30), "test": dict.fromkeys("abcd", 50)},
        curves={("vanilla", 0): CURVE, ("diffusemix", 0): CURVE},
        steps={"vanilla": 900, "diffusemix": 900},
        few_images={},
        test_reads=3,
        versions={"data.dvc": "0123456789abcdef.dir"},
    )
    return replace(given, **changed)


def written(folder: Path, given: ReportInputs | None = None) -> Report:
    return write_report(given or inputs(), folder / "report", aside=folder / "aside")


def words(report: Report) -> str:
    """Return the page's text without its tags."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", report.html.read_text("utf-8"), flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", text.replace("\u00a0", " ")))


@pytest.fixture
def undrawn(monkeypatch):
    """Make every plot one and the same: for tests of words and numbers."""
    png = pictures.contact_sheet([[np.zeros((1, 1, 3), np.uint8)]], cell=1)
    for name in (
        "accuracy_curves", "class_histogram", "differences",
        "heat_map", "learning_curves", "reliability_diagram",
    ):  # fmt: skip
        monkeypatch.setattr(pictures, name, lambda *_, **__: png)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    return written(tmp_path_factory.mktemp("report"))


def test_the_numbers_are_those_of_the_evidence(report):
    vanilla, diffusemix = report.summary.loc["vanilla"], report.summary.loc["diffusemix"]
    assert vanilla[["clean", "corrupted", "fgsm"]].tolist() == pytest.approx([0.8, 0.4, 0.6])
    assert diffusemix[["clean", "corrupted", "fgsm"]].tolist() == pytest.approx([0.8, 0.7, 0.4])
    assert report.titles["fgsm"] == "FGSM 2/255"
    for arm, row in (("vanilla", vanilla), ("diffusemix", diffusemix)):
        judged = inputs().evidence[arm, 0]
        expected = expected_calibration_error(judged.probabilities, judged.labels)
        assert row["ece"] == pytest.approx(expected, abs=1e-5)
    assert diffusemix["corrupted_difference"] == pytest.approx(0.3)
    assert (
        0 < diffusemix["corrupted_difference_low"] < 0.3 < diffusemix["corrupted_difference_high"]
    )
    assert np.isnan(vanilla["corrupted_difference"])
    ends = [f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")]
    assert set(ends) < set(report.summary.columns)


def test_the_headline_says_what_helped_what_hurt_and_what_did_neither(report):
    trained = "one training seed (another may say otherwise)"
    assert f"on 200 test images and {trained}, DiffuseMix" in report.headline
    assert "DiffuseMix made no significant difference to clean accuracy (+0.0" in report.headline
    assert "improved accuracy under corruption (+30.0 points, +" in report.headline
    assert "hurt FGSM accuracy at 2/255 (−20.0 points, −" in report.headline
    assert report.headline in words(report)


def test_the_words_follow_the_intervals(report):
    document = json.loads(report.json.read_text())
    differences = document["arms"][1]["difference"]
    assert [differences[name]["significant"] for name in MEASURES[:3]] == [False, True, True]
    for name, difference in differences.items():
        leaves_zero_out = not difference["low"] <= 0 <= difference["high"]
        assert bool(difference["significant"]) == (leaves_zero_out and name != "ece")
        assert name == "ece" or difference["significant"] == (difference["p"] < 0.05)
    held = sum(differences[name]["significant"] is False for name in MEASURES)
    in_table = re.findall(r'class="verdict">no significant difference<', report.html.read_text())
    assert len(in_table) == held
    assert report.headline.count("no significant difference") == 1


def test_the_notes_say_what_the_numbers_do_not_show(report):
    text = words(report)
    for note in (
        "Intervals cover the sampling of test images only",
        "trained with one seed (0)",
        "has been read 3 times",
        "took the same 900 optimiser steps",
        "No picture lies in two splits",
        "FGSM is one step of a weak attack",
        "cannot be compared with a published mCE",
    ):
        assert note in text


def test_every_corruption_is_shown_with_its_interval(report):
    text = words(report)
    for arm, value in zip(json.loads(report.json.read_text())["arms"], (0.4, 0.7), strict=True):
        assert [(one["family"], one["severity"]) for one in arm["corruptions"]] == [
            ("contrast", 1), ("contrast", 5), ("fog", 1), ("fog", 5),
        ]  # fmt: skip
        for one in arm["corruptions"]:
            assert one["low"] < one["value"] == value < one["high"]
            shown = f"{100 * value:.1f} % {100 * one['low']:.1f}–{100 * one['high']:.1f}"
            assert text.count(shown) == 4


@pytest.mark.usefixtures("undrawn")
def test_what_is_unfair_or_leaks_is_named(tmp_path):
    given = inputs(
        steps={"vanilla": 900, "diffusemix": 1800},
        copies=[{"split": "train", "image": "train/a/1.png", "held_out": "test/a/9.png"}],
        set_aside=[{"source_id": "a/broken.png", "reason": "not an image"}],
        counts={"train": dict.fromkeys("abcd", 30), "test": {"a": 150}},
    )
    text = words(written(tmp_path, given))
    assert "No test image shows b, c and d: this report says nothing of that." in text
    assert "no fair comparison: Vanilla 900, DiffuseMix 1,800" in text
    assert "1 picture lies in two splits" in text
    for name in ("train/a/1.png", "test/a/9.png", "a/broken.png", "not an image"):
        assert name in text
    assert "diffusemix drop with the first name of a pair takes that picture out." in text


@pytest.mark.usefixtures("undrawn")
def test_splits_stand_in_the_order_of_their_use(tmp_path):
    counts = {split: dict.fromkeys("abcd", 30) for split in ("test", "train", "val")}
    page = written(tmp_path, inputs(counts=counts)).html.read_text("utf-8")
    rows = re.findall(r'<th scope="row">(train|val|test)</th>', page)
    assert rows == ["train", "val", "test"]


@pytest.mark.usefixtures("undrawn")
def test_several_seeds_are_averaged(tmp_path):
    given = inputs(
        evidence={
            ("diffusemix", 1): evidence(0.9, 0.5, 0.5),
            ("vanilla", 1): evidence(0.6, 0.6, 0.4),
            ("vanilla", 0): evidence(0.8, 0.6, 0.4),
            ("diffusemix", 0): evidence(0.7, 0.5, 0.5),
        }
    )
    report = written(tmp_path, given)
    assert list(report.summary.index) == ["vanilla", "diffusemix"]
    assert report.summary["clean"].tolist() == pytest.approx([0.7, 0.8])
    assert report.summary.loc["diffusemix", "clean_difference"] == pytest.approx(0.1)
    assert "means over 2 training seeds" in words(report)
    assert "sampling of test images and of training seeds" in words(report)
    alone = inputs(evidence={key: one for key, one in given.evidence.items() if key[1] == 0})
    alone = written(tmp_path / "one seed", alone).summary.loc["diffusemix"]
    both = report.summary.loc["diffusemix"]
    width = both["clean_difference_high"] - both["clean_difference_low"]
    assert width > 2 * (alone["clean_difference_high"] - alone["clean_difference_low"])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("arm", ["vanilla", "diffusemix"])
def test_one_arm_alone_is_reported_without_a_comparison(tmp_path, arm):
    given = inputs()
    report = written(tmp_path, replace(given, evidence={(arm, 0): given.evidence[arm, 0]}))
    assert report.headline.startswith("There is no comparison")
    assert "80.0 % clean" in report.headline
    validate(report)


@pytest.mark.usefixtures("undrawn")
def test_arms_judged_on_other_images_are_refused(tmp_path):
    given = inputs()
    other = replace(given.evidence["diffusemix", 0], ids=tuple("x" * IMAGES))
    with pytest.raises(UserError, match="diffusemix, seed 0, has other ids"):
        written(tmp_path, inputs(evidence={**given.evidence, ("diffusemix", 0): other}))
    with pytest.raises(UserError, match="no arm"):
        written(tmp_path, inputs(evidence={}))


def validate(report: Report) -> None:
    package = resources.files("diffusemix_pipeline.evaluation")
    schema = json.loads(package.joinpath("report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(report.json.read_text()), schema)


def test_report_json_is_valid_and_documented(report):
    validate(report)
    manual = (Path(__file__).parents[1] / "docs" / "report.md").read_text("utf-8")
    for key in json.loads(report.json.read_text()):
        assert f"`{key}" in manual


def test_the_same_evidence_gives_the_same_bytes(report, tmp_path):
    again = written(tmp_path)
    names = {path.name for path in report.folder.iterdir()}
    assert names == {path.name for path in again.folder.iterdir()}
    assert {"index.html", "report.json", "fgsm.png", "differences.png"} < names
    for name in names:
        assert (report.folder / name).read_bytes() == (again.folder / name).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_replaced_as_a_whole_and_read_back(tmp_path):
    written(tmp_path)
    (tmp_path / "report" / "old.png").write_bytes(b"")
    report = written(tmp_path)
    assert not (tmp_path / "report" / "old.png").exists()
    assert not list((tmp_path / "aside").iterdir())
    assert all(path.exists() for path in (report.html, report.json, *report.plots))
    again = read_report(report.folder)
    assert again.headline == report.headline
    pd.testing.assert_frame_equal(again.summary, report.summary)


class Page(HTMLParser):
    """Collects what a page has that could run or load, and pictures without words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.silent_images = 0
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.sources += [given[name] for name in ("src", "srcset", "href") if name in given]
        self.silent_images += tag == "img" and not given.get("alt")
        self.handlers += [name for name in given if name.startswith("on")]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_names_are_shown_and_nothing_runs(tmp_path):
    hostile = [HOSTILE, "\udcff\x00", "x" * 300, "</style><img src=x onerror=alert(1)>"]
    counts = {"train": dict.fromkeys(hostile, 3)}
    editing = SETTINGS.editing.model_copy(update={"prompts": [HOSTILE]})
    given = inputs(
        classes=hostile,
        counts=counts,
        settings=SETTINGS.model_copy(update={"editing": editing}),
        copies=[{"split": "val", "image": HOSTILE, "held_out": HOSTILE}],
        set_aside=[{"source_id": HOSTILE, "reason": HOSTILE}],
        versions={HOSTILE: HOSTILE},
    )
    report = written(tmp_path, given)
    text = report.html.read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert not page.handlers
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(" in text
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not page.silent_images
    assert len(report.folder.joinpath("report.json").read_bytes()) > 0


def test_the_page_needs_nothing_but_itself(report):
    text = report.html.read_text("utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.usefixtures("undrawn")
def test_very_many_classes_are_shown_in_part(tmp_path):
    names = [f"class {number}" for number in range(IMAGES // 2)]
    labels = np.arange(IMAGES) % len(names)
    given = inputs()
    wide = {
        key: replace(one, labels=labels, probabilities=np.eye(len(names), dtype=np.float32)[labels])
        for key, one in given.evidence.items()
    }
    report = written(tmp_path, replace(given, evidence=wide, classes=names))
    assert "30 of 100 classes" in words(report)
    assert len(json.loads(report.json.read_text())["arms"][0]["classes"]) == 100


def twelve(**changed) -> ReportInputs:
    """Return a comparison of all arms, of which PixMix is better than DiffuseMix by far."""
    gains = {arm: 0.4 + 0.01 * place for place, arm in enumerate(ARMS)}
    gains |= {"pixmix": 0.95, "diffusemix": 0.7, "vanilla": 0.4}
    arms = {arm: evidence(0.8, 0.6, gain) for arm, gain in gains.items()}
    given = inputs(
        evidence={(arm, 0): one for arm, one in arms.items()},
        curves={(arm, 0): CURVE for arm in arms},
        steps=dict.fromkeys(arms, 900),
    )
    return replace(given, **changed)


@pytest.fixture(scope="module")
def of_all_arms(tmp_path_factory) -> Report:
    return written(tmp_path_factory.mktemp("twelve"), twelve())


def test_every_arm_is_reported_and_a_better_rival_is_in_the_headline(of_all_arms):
    validate(of_all_arms)
    assert list(of_all_arms.summary.index) == list(ARMS)
    behind = r"but fell behind PixMix \(\+25\.0 points, .*\) in accuracy under corruption, PixMix "
    assert re.search(rf"{behind}\(\+12\.5 points, .*\) in the mean of both;", of_all_arms.headline)
    assert re.search(r"; DiffuseMix online \S.*, but fell behind PixMix", of_all_arms.headline)
    assert "Every other arm less DiffuseMix online" in words(of_all_arms)
    assert "after Holm's correction for 11 arms" in words(of_all_arms)
    names = {plot.stem for plot in of_all_arms.plots}
    assert {"corruptions_by_arm", "corruptions_diffusemix_difference"} < names


def test_families_that_arms_were_shown_are_named_and_left_out(of_all_arms):
    document = json.loads(of_all_arms.json.read_text())
    shared = document["shared_families"]
    assert shared["left_out"] == ["contrast", "fog"]
    assert shared["arms"]["trivialaugment"] == ["defocus_blur", "brightness", "contrast"]
    assert "fog" in shared["prompts"]["sunset"]
    assert "mosaic edits: pixelate" in words(of_all_arms)
    # Where nothing is left, there are no such numbers, and all families count.
    assert {arm["corrupted_unshared"] for arm in document["arms"]} == {None}


@pytest.mark.usefixtures("undrawn")
def test_unshared_numbers_are_of_the_families_that_no_arm_was_shown(tmp_path):
    given = inputs()
    families = {
        key: replace(one, corruptions=("contrast", "glass_blur"), corrupted=one.corrupted.copy())
        for key, one in given.evidence.items()
    }
    families["diffusemix", 0].corrupted[0] = True  # all is gained under contrast
    families["diffusemix", 0].corrupted[1] = families["vanilla", 0].corrupted[1]
    report = written(tmp_path, replace(given, evidence=families))
    vanilla, ours = json.loads(report.json.read_text())["arms"]
    assert ours["corrupted"]["value"] == pytest.approx(0.7)
    assert ours["corrupted_unshared"]["value"] == vanilla["corrupted_unshared"]["value"] == 0.4
    assert ours["difference"]["corrupted"]["significant"]
    assert not ours["difference"]["corrupted_unshared"]["significant"]
    assert ours["overall"]["value"] == pytest.approx((0.8 + 0.4) / 2)
    # Half of the families lost all their errors; the other half kept theirs.
    assert ours["mce_to_vanilla"]["value"] == pytest.approx(0.5)
    assert ours["mce_to_vanilla_unshared"]["value"] == 1
    # The first sentence judges by these, and every table has them.
    said = "made no significant difference to accuracy under unshared corruption"
    assert said in report.headline
    assert report.summary.loc["diffusemix", "corrupted_unshared_difference"] == 0
    assert "Corrupted, unshared" in words(report)
    assert "Corrupted, unshared" in (report.folder / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("strength", "left", "warned"),
    [
        (0, 0, "FGSM accuracy at 1/255 rose for DiffuseMix, where no stronger attack was tried"),
        (1, 0, "FGSM accuracy at 2/255 rose for DiffuseMix, where no stronger attack was tried"),
        (2, 0, "FGSM accuracy at 8/255 rose for DiffuseMix, while under AutoAttack at 8/255"),
        (2, 5, ""),
        (None, 0, ""),
    ],
    ids=[
        "at a small one",
        "at the headline's",
        "at AutoAttack's",
        "and AutoAttack's too",
        "not at all",
    ],
)
def test_fgsm_that_rises_alone_is_no_robustness_and_said_so(tmp_path, strength, left, warned):
    given = inputs()
    attacked = given.evidence["vanilla", 0].fgsm.copy()
    if strength is not None:
        attacked[strength] |= np.arange(IMAGES) < 0.9 * IMAGES
    risen = replace(evidence(0.8, 0.6, 0.4), fgsm=attacked, autoattack=np.arange(10) < left)
    report = written(tmp_path, inputs(evidence={**given.evidence, ("diffusemix", 0): risen}))
    assert ("WARNING" in words(report)) == bool(warned)
    assert warned in words(report)


@pytest.mark.usefixtures("undrawn")
def test_an_arm_that_rises_at_another_strength_than_the_rest_is_warned_of_too(tmp_path):
    given, arms = inputs(), {}
    for arm, strength in (("mixup", 2), ("diffusemix", 1)):
        attacked = given.evidence["vanilla", 0].fgsm.copy()
        attacked[strength] |= np.arange(IMAGES) < 0.9 * IMAGES
        none_left = np.zeros(10, bool)
        arms[arm, 0] = replace(evidence(0.8, 0.6, 0.4), fgsm=attacked, autoattack=none_left)
    every = {("vanilla", 0): given.evidence["vanilla", 0], **arms}
    report = written(
        tmp_path,
        inputs(
            evidence=every,
            curves=dict.fromkeys(every, CURVE),
            steps={arm: 900 for arm, _ in every},
        ),
    )
    assert "FGSM accuracy at 8/255 rose for Mixup, while under AutoAttack" in words(report)
    assert "FGSM accuracy at 2/255 rose for DiffuseMix, where no stronger" in words(report)
    assert words(report).count("WARNING") == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("editor", "arm", "told"),
    [("bundled", "diffusemix", True), ("folder", "diffusemix", False), ("bundled", "mixup", False)],
)
def test_what_the_bundled_editor_has_seen_is_said_where_its_edits_are_used(
    tmp_path, editor, arm, told
):
    editing = SETTINGS.editing.model_copy(update={"editor": editor})
    arms = {("vanilla", 0): evidence(0.8, 0.4, 0.4), (arm, 0): evidence(0.8, 0.6, 0.4)}
    report = written(
        tmp_path,
        inputs(
            evidence=arms,
            settings=SETTINGS.model_copy(update={"editing": editing}),
            curves=dict.fromkeys(arms, CURVE),
            steps={"vanilla": 900, arm: 900},
        ),
    )
    assert ("The bundled editor has learnt from pictures" in words(report)) == told


@pytest.mark.usefixtures("undrawn")
def test_arms_whose_seeds_lie_further_apart_than_the_others_are_named(tmp_path):
    arms = {"vanilla": 0.0, "mixup": 0.01, "diffusemix": 0.1}
    every = {
        (arm, seed): evidence(0.7 + apart * seed, 0.4, 0.4 + apart * seed, seed=seed)
        for arm, apart in arms.items()
        for seed in (0, 1, 2)
    }
    report = written(
        tmp_path,
        inputs(
            evidence=every,
            curves=dict.fromkeys(every, CURVE),
            steps=dict.fromkeys(arms, 900),
        ),
    )
    document = json.loads(report.json.read_text())
    [note] = [n for n in document["notes"] if "lie further apart" in n]
    assert "DiffuseMix (a standard deviation of 10.1 points, the others' " in note
    assert "Mixup" not in note
    apart = {arm["arm"]: arm["seed_deviation"] for arm in document["arms"]}
    assert apart == {
        "vanilla": 0,
        "mixup": pytest.approx(0.01, abs=0.005),
        "diffusemix": pytest.approx(0.1, abs=0.005),
    }


@pytest.mark.usefixtures("undrawn")
def test_prompts_of_which_nothing_is_known_are_named(tmp_path):
    given = inputs(settings=with_prompts("cartoon"))
    families = {
        key: replace(one, corruptions=("glass_blur", "snow")) for key, one in given.evidence.items()
    }
    report = written(tmp_path, replace(given, evidence=families))
    assert "What these prompts show is not known: cartoon." in words(report)


def with_prompts(*prompts: str) -> Settings:
    asked = SETTINGS.model_dump() | {"editing": {"prompts": list(prompts)}}
    return Settings.model_validate(asked)


@pytest.mark.filterwarnings("error:.*constrained_layout")
def test_an_arm_of_ones_own_is_called_by_its_file_and_fits_the_plots(tmp_path):
    own = f"arms/{'long_' * 12}.py"
    arms = {("vanilla", 0): evidence(0.8, 0.6, 0.4), (own, 0): evidence(0.8, 0.4, 0.7, seed=1)}
    curves, steps = dict.fromkeys(arms, CURVE), {"vanilla": 900, own: 900}
    report = written(tmp_path, inputs(evidence=arms, curves=curves, steps=steps))
    validate(report)
    assert title_of(own) == "long_" * 12
    assert {path.parent for path in report.folder.rglob("*.png")} == {report.folder}
    assert "long_" * 12 in words(report)
    assert "What these arms are shown in training is not known" in words(report)


def test_what_is_significant_is_drawn_solid(monkeypatch, tmp_path):
    drawn: list[set[tuple[str, str]]] = []
    differences = pictures.differences

    def told(intervals, significant, **how) -> bytes:
        drawn.append(significant)
        return differences(intervals, significant, **how)

    monkeypatch.setattr(pictures, "differences", told)
    report = written(tmp_path, twelve())
    titles = {"clean": "Clean", "corrupted": "Corrupted", "fgsm": "FGSM 2/255"}
    solid = {
        (title, title_of(arm["arm"]))
        for arm in json.loads(report.json.read_text())["arms"]
        for measure, title in titles.items()
        if arm["difference"] and arm["difference"][measure]["significant"]
    }
    assert drawn == [solid, solid]
    assert solid


@pytest.mark.usefixtures("undrawn")
def test_attacks_that_were_not_tried_are_not_reported(tmp_path):
    none = np.zeros(0, bool)
    given = {
        key: replace(one, attacked=np.zeros(0, np.int64), pgd=none, autoattack=none)
        for key, one in inputs().evidence.items()
    }
    report = written(tmp_path, inputs(evidence=given))
    validate(report)
    text = words(report)
    assert "PGD" not in text.split("Settings")[0]
    assert json.loads(report.json.read_text())["arms"][1]["pgd"] is None


def test_proper_scores_are_those_of_the_answers(report):
    judged = inputs().evidence["vanilla", 0]
    own = judged.probabilities[np.arange(IMAGES), judged.labels].astype(float)
    vanilla = json.loads(report.json.read_text())["arms"][0]
    assert vanilla["nll"]["value"] == pytest.approx(-np.log(own).mean(), abs=1e-5)
    truth = np.eye(4)[judged.labels]
    brier = ((judged.probabilities - truth) ** 2).sum(axis=1).mean()
    assert vanilla["brier"]["value"] == pytest.approx(brier, abs=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_moves_of_answers_are_counted_by_class(tmp_path):
    given = inputs()
    base = given.evidence["vanilla", 0]
    moved = base.probabilities.copy()
    of_a = np.flatnonzero(base.labels == 0)[:10]
    moved[of_a] = np.eye(4, dtype=np.float32)[3]
    ours = replace(base, probabilities=moved)
    report = written(tmp_path, inputs(evidence={**given.evidence, ("diffusemix", 0): ours}))
    confusion = json.loads(report.json.read_text())["confusion"]
    change = dict(zip(confusion["classes"], confusion["change"], strict=True))
    assert change["a"][confusion["classes"].index("d")] == pytest.approx(10 / 50)
    assert change["a"][0] == pytest.approx(-10 / 50)
    assert "b" not in change


def test_the_page_for_a_pull_request_says_the_same(report):
    text = (report.folder / "report.md").read_text("utf-8")
    assert text.startswith(f"**{report.headline}**")
    assert "| DiffuseMix |" in text
    assert "+30.0, better" in text
    assert "−20.0, worse" in text
    assert "+0.0, no significant difference" in text
    for note in json.loads(report.json.read_text())["notes"]:
        assert note.split(":")[0] in text


@pytest.mark.usefixtures("undrawn")
def test_a_prompt_is_no_markdown(tmp_path):
    editing = SETTINGS.editing.model_copy(update={"prompts": ["snowy", "a|b <img> [x](y)\n# z"]})
    given = inputs(settings=SETTINGS.model_copy(update={"editing": editing}))
    text = (written(tmp_path, given).folder / "report.md").read_text("utf-8")
    assert r"a\|b \<img\> \[x\](y) \# z" in text


@pytest.mark.usefixtures("undrawn")
def test_two_reports_are_compared_by_numbers_settings_and_test_images(tmp_path):
    before = written(tmp_path / "before", inputs(versions={"test": "a", "code": "1"}))
    editing = SETTINGS.editing.model_copy(update={"prompts": ["a|b"]})
    better = {("vanilla", 0): evidence(0.9, 0.6, 0.4), ("mixup", 0): evidence(0.8, 0.4, 0.7)}
    given = inputs(
        evidence=better,
        settings=SETTINGS.model_copy(update={"editing": editing}),
        curves=dict.fromkeys(better, CURVE),
        steps={"vanilla": 900, "mixup": 900},
        versions={"test": "b", "code": "1"},
    )
    after = written(tmp_path / "after", given)
    text = changes(read_document(before.folder), read_document(after.json))
    assert before.headline in text
    assert after.headline in text
    [row] = [line for line in text.splitlines() if re.match(r"\| Vanilla +\| Clean", line)]
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["80.0", "90.0"]
    assert "+10.0 (+" in row
    assert "no significant difference" not in row
    [brier] = [line for line in text.splitlines() if re.match(r"\| Vanilla +\| Brier", line)]
    assert re.search(r"0\.\d{3} .* −0\.\d{3} \(−0\.\d{3} to [−+]0\.\d{3}\)", brier)
    [fgsm] = [line for line in text.splitlines() if re.match(r"\| Vanilla +\| FGSM 2/255", line)]
    assert "+0.0 (" in fgsm
    assert "no significant difference" in fgsm
    assert "95 % intervals" in text
    assert "In one report only: DiffuseMix, Mixup." in text
    assert "The test images are not the same" in text
    assert r'\["a\|b"\]' in text
    assert "code" not in text.split("Versions that differ")[1]
    assert re.search(r"\| test +\| a +\| b +\|", text)
    hostile = read_document(after.json)
    hostile["headline"] = "<img src=x onerror=alert(1)> \x1b[31m"
    hostile["arms"][1]["arm"] = "<b>|</b>"
    hostile["settings"]["seed"] = 1
    shown = changes(read_document(before.folder), hostile)
    assert "<img" not in shown.replace("\\<", "")
    assert "<b>" not in shown.replace("\\<", "")
    assert "\x1b" not in shown
    assert "**seed is not the same**" in shown
    same = changes(read_document(before.folder), read_document(before.folder))
    assert "Settings: no difference." in same
    assert "Versions: no difference." in same
    assert "not the same" not in same


@pytest.mark.parametrize("content", [None, "", "[]", '{"schema_version": 1}'])
def test_what_is_no_report_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="no report"):
        read_document(tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_lacks_a_number_is_named_with_the_number(tmp_path):
    report = written(tmp_path, inputs())
    document = json.loads(report.json.read_text())
    del document["arms"][1]["clean"]
    report.json.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"whole report: at \$\.arms\[1\], 'clean' is"):
        read_document(report.json)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"headline": "It', b"\x93junk\xff", b'{"arms": []}']
)
def test_a_damaged_report_is_named_with_the_repair(content, tmp_path):
    report = written(tmp_path)
    report.json.write_bytes(content)
    with pytest.raises(UserError, match="report.json is damaged .*`diffusemix run` makes it anew"):
        read_report(report.folder)


def test_where_no_report_is_yet_it_says_what_makes_one(tmp_path):
    with pytest.raises(UserError, match="no report in .* yet: `diffusemix run` makes one"):
        read_report(tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_accuracy_over_the_number_of_images_ends_with_all_of_them(tmp_path):
    gain = {"vanilla": 0.0, "diffusemix": 0.2}
    few = {
        (arm, number, seed): evidence(0.3 + number / 100 + seed / 50 + gain[arm], 0.1, 0.1)
        for arm in gain
        for number in (5, 10)
        for seed in (0, 1)
    }
    given = inputs()
    both = {(arm, seed): one for (arm, _), one in given.evidence.items() for seed in (0, 1)}
    report = written(tmp_path, replace(given, evidence=both, few_images=few))
    validate(report)
    points = json.loads(report.json.read_text())["few_images"]
    assert [(p["arm"], p["per_class"]) for p in points] == [
        (arm, number) for arm in ("vanilla", "diffusemix") for number in (5, 10, 30)
    ]
    assert [p["value"] for p in points[:3]] == pytest.approx([0.36, 0.41, 0.8], abs=0.005)
    assert all(p["low"] < p["value"] < p["high"] for p in points)
    assert [p["difference"] for p in points[:3]] == [None] * 3
    changes = [p["difference"]["value"] for p in points[3:]]
    assert changes == pytest.approx([0.2, 0.2, 0], abs=0.005)
    assert [p["difference"]["significant"] for p in points[3:]] == [True, True, False]
    assert "With fewer training images" in words(report)
    assert (report.folder / "few_images.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_published_sets_are_one_more_accuracy(tmp_path):
    given = {
        key: replace(
            one,
            published_sets=("fog/1", "fog/2", "saturate/1"),
            published=np.stack(
                [np.arange(60) < 60 * share, np.arange(60) < 30, np.arange(60) < 60]
            ),
        )
        for (key, one), share in zip(inputs().evidence.items(), (0.3, 0.9), strict=True)
    }
    report = written(tmp_path, inputs(evidence=given))
    validate(report)
    vanilla, ours = json.loads(report.json.read_text())["arms"]
    assert vanilla["published"]["value"] == pytest.approx(0.4)  # saturate is none of the fifteen
    by_set = {one["set"]: one["value"] for one in vanilla["published_by_set"]}
    assert by_set == pytest.approx({"fog/1": 0.3, "fog/2": 0.5, "saturate/1": 1})
    assert ours["difference"]["published"]["value"] == pytest.approx(0.3)
    assert ours["difference"]["published"]["significant"]
    assert "2 published sets of corrupted images (other families than" in words(report)

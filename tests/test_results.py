"""Promise: the published tables are of answers to what their settings ask, all of it counted."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_classes
from scipy import stats

from benchmarks import ablation, results
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.statistics import Estimate

EXPERIMENTS = sorted(path.stem for path in results.HOME.glob("*.yaml"))


def asked(name: str, **changed) -> pd.DataFrame:
    """Return the last readings that answer what an experiment's settings, or others, ask."""
    settings = results._settings(name, [f"{key}={value}" for key, value in changed.items()])
    last = results._last_answers(results._readings(name))
    facts = results._facts(name)
    return last[[results._is_asked(row, facts, settings) for row in last.itertuples()]]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_answers_are_of_the_settings_beside_them(name):
    last, wanted = asked(name), results.all_fits(results._settings(name))
    answered = last[["arm", "seed"]].itertuples(index=False, name=None)
    assert set(answered) == {(fit.arm, fit.seed) for fit in wanted}
    assert set(last["steps"]) == {results._settings(name).training.steps}
    tested = sum(results._facts(name)["counts"]["by_split"]["test"].values())
    for arm, seed in last[["arm", "seed"]].itertuples(index=False, name=None):
        evidence = Evidence.load(results._answers(name, arm, seed))
        assert len(evidence.ids) == tested
        assert evidence.corrupted.shape[:2] == (15, 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_published_page_holds_the_tables(tmp_path):
    """Every row and headline, under the experiment's title: the words around them are by hand."""
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text("utf-8")
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", page, flags=re.M))
    titles = ["CIFAR-10", "Flowers, 12 species", "Flowers, 10 images a class", "Both together"]
    for title, table in zip(titles, results.tables(tmp_path), strict=True):
        shown = {squeezed(line) for line in sections[title].splitlines()}
        wanted = [squeezed(line) for line in table.splitlines() if line.startswith("| ")]
        assert len(wanted) > 11
        assert [row for row in wanted if row not in shown] == []
        headline = [line.strip("*") for line in table.splitlines() if line.startswith("**Against")]
        assert all(f"> {line}" in sections[title] for line in headline)


def squeezed(row: str) -> str:
    return re.sub(r" +", " ", row)


def test_an_answer_is_known_by_the_editor_and_the_mixing_too(monkeypatch):
    whole = set(asked("flowers12")["arm"])
    monkeypatch.setattr(results, "MIX_VERSION", "another")
    assert "vanilla" in set(asked("flowers12")["arm"])
    assert "diffusemix" in whole - set(asked("flowers12")["arm"])
    monkeypatch.undo()
    monkeypatch.setattr(results, "editor_fingerprint", lambda folder, lora: "another")
    assert "diffusemix" in whole - set(asked("flowers12")["arm"])


def test_what_is_not_answered_is_named(monkeypatch, tmp_path):
    known = results._is_asked
    monkeypatch.setattr(
        results, "_is_asked", lambda row, *of: row.arm in ("vanilla", "mixup") and known(row, *of)
    )
    monkeypatch.setattr(results, "TOGETHER", ())
    first = next(results.tables(tmp_path))
    assert first.startswith("**Left out of cifar10, as not answered: trivialaugment, seed 0,")
    assert "mixup" not in first


def test_answers_to_other_settings_are_not_shown():
    whole = set(asked("flowers12")["arm"])
    other = set(asked("flowers12", **{"mixing.lam": 0.2})["arm"])
    assert whole - other == {
        *("generated_only", "hybrid_only", "diffusemix", "diffusemix_online", "diffusemix+cutmix"),
    }
    assert asked("flowers12", **{"training.steps": 10}).empty


def test_readings_of_the_same_test_images_are_counted_together():
    reads = results._reads_by_test()
    of = {name: results._facts(name)["test"] for name in EXPERIMENTS}
    assert of["flowers12"] == of["flowers12_10"] != of["cifar10"]
    both = len(results._readings("flowers12")) + len(results._readings("flowers12_10"))
    assert reads[of["flowers12"]] == both


@pytest.mark.slow
def test_a_row_is_reproduced_beside_what_is_published(tmp_path, monkeypatch):
    home, photos = tmp_path / "published", tmp_path / "photos"
    home.mkdir()
    for number, split in enumerate(["train", "val", "test"]):
        write_classes(photos / split, ["cat", "dog"], 6, seed=number)
    (home / "tiny.yaml").write_text(
        "size: 32\n"
        "training: {model: test_resnet, arms: [vanilla, mixup], steps: 2, batch_size: 4}\n"
        "evaluation: {corruptions: [contrast, gaussian_noise], severities: [3], "
        "fgsm_epsilons: [2], attack_images: 2, autoattack_images: 1}\n"
    )
    monkeypatch.setattr(results, "HOME", home)
    asked = "tiny", photos, tmp_path / "work", [0], ["mixup"]
    results.produce(*asked)
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    again = results.reproduce(*asked[:2], tmp_path / "again", *asked[3:])
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    evidence = Evidence.load(results._answers("tiny", "mixup", 0))
    clean = f"{100 * evidence.correct.mean():.1f}"
    [row] = [line for line in again.splitlines() if line.startswith("| Mixup")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["Mixup", "0", f"{clean}, {clean}"]
    assert cells[-1] == "100.0"
    write_classes(photos / "train", ["cat", "dog"], 6, seed=9)
    with pytest.raises(UserError, match="does not hold the images that tiny is published on"):
        results.reproduce(*asked)


def test_the_mean_of_two_experiments_is_as_sure_as_both_are():
    one, other = Estimate(0.02, -0.02, 0.06, 0.3), Estimate(0.06, 0.03, 0.09, 0.001)
    mean = results._mean([one, other])
    reach = stats.norm.ppf(0.975)
    error = np.hypot(0.04 / reach, 0.03 / reach) / 2
    assert mean.value == pytest.approx(0.04)
    assert (mean.low, mean.high) == pytest.approx((0.04 - reach * error, 0.04 + reach * error))
    assert mean.p == pytest.approx(2 * stats.norm.sf(0.04 / error))


def test_published_tables_hold_each_arms_other_measures():
    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.0, "high": 1.0}

    vanilla = {"arm": "vanilla", "mce_to_vanilla": None, "mce_to_vanilla_unshared": None}
    augmix = {"arm": "augmix", "mce_to_vanilla": estimate(0.8125), "mce_to_vanilla_unshared": None}
    measured = {
        "overall": estimate(0.5),
        "pgd": estimate(0.25),
        "autoattack": None,
        "brier": estimate(0.194),
        "nll": estimate(1.25),
        "seed_deviation": 0.0214,
    }
    document = {
        "attacks": {"epsilon": 8.0},
        "arms": [vanilla | measured, augmix | measured | {"autoattack": estimate(0.0)}],
    }
    titles, line, *rows = map(squeezed, results._more_measures(document).splitlines())
    assert titles == (
        "| Arm | Mean of clean and unshared | mCE, normalised by vanilla | The same, unshared "
        "| PGD-20, 8/255 | AutoAttack, 8/255 | SD over seeds | Brier | NLL |"
    )
    assert set(line) == set("|:-")
    assert rows == [
        "| Vanilla | 50.0 | | | 25.0 | | 2.1 | 0.194 | 1.250 |",
        "| AugMix | 50.0 | 81.2 | | 25.0 | 0.0 | 2.1 | 0.194 | 1.250 |",
    ]


def test_an_ablation_leaves_out_what_any_of_its_choices_shows(tmp_path):
    families = ["gaussian_noise", "contrast", "fog", "pixelate", "defocus_blur"]
    bench = ablation.Bench(tmp_path, "images", results.HOME / "flowers12.yaml")

    def left_out(*names: str) -> list[str]:
        return ablation._shared(bench, names, families)

    assert left_out("vanilla") == []
    assert left_out("vanilla", "diffusemix") == ["contrast", "fog", "pixelate", "defocus_blur"]
    assert "pixelate" not in left_out("vanilla", "prompts: weather and light")
    assert "fog" not in left_out("vanilla", "prompts: art")

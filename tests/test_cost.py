"""Promises: a pilot is paid for once, its prediction follows from it, a budget is kept to."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import quick_settings, tiny_editor, write_classes
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from diffusemix_pipeline.cli import main
from diffusemix_pipeline.datasets.dropped import Dropped
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.editing.cost import Cost, forecast, run_pilot, share_within
from diffusemix_pipeline.editing.gate import ACCEPTED
from diffusemix_pipeline.editing.generate import (
    LabelGate,
    generate,
    make_edits,
    open_edits,
)
from diffusemix_pipeline.editing.planning import plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.editing.verdicts import Verdicts
from diffusemix_pipeline.settings import Settings

COST = Cost(
    pilot=8,
    round_edits=4,
    round_seconds=2.0,
    edit_bytes=1000.0,
    accepted=None,
)
NONE_JUDGED = Verdicts([])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture
def raw(tmp_path, weights) -> Stage:
    source = write_classes(tmp_path / "data", ["cat", "dog"], 15)
    aside = tmp_path / "aside"
    wanted = settings_of(weights)
    return ingest(str(source), wanted, tmp_path / "raw", aside=aside, train_only=True)


def settings_of(weights: Path, *overrides: str) -> Settings:
    return quick_settings(
        "source.train_per_class=null",
        "editing.batch_size=2",
        f"editing.editor={weights}",
        *overrides,
    )


def test_a_round_is_paid_for_as_a_whole():
    assert COST.seconds(80) == 40
    assert COST.seconds(81) == 42


def test_the_pilot_is_of_the_wanted_edits_and_paid_for_once(raw, weights, tmp_path):
    settings, store = settings_of(weights), EditStore(tmp_path / "edits")
    plan = plan_edits(raw, settings)
    cost = run_pilot(plan, store, device="cpu")
    assert cost is not None
    assert cost.pilot == len(list(store)) == 24
    assert {edit.key for edit in plan} >= set(store)
    assert cost.edit_bytes == sum(store.path(key).stat().st_size for key in store) / 24
    assert cost.round_seconds > 0
    left = forecast(plan, store, NONE_JUDGED, cost)
    out, aside = tmp_path / "out", tmp_path / "aside"
    result = generate(raw, settings, out, store=store, aside=aside, device="cpu")
    assert result.made == left.edits == 30 - 24
    assert result.stage.counts["images"] == left.images == 30
    size = sum(path.stat().st_size for path in out.rglob("*.png"))
    assert left.megabytes == pytest.approx(size / 1e6, rel=0.1)
    assert left.disk_megabytes == pytest.approx((6 + 2 * 30) * cost.edit_bytes / 1e6)
    assert run_pilot(plan, store, device="cpu") is None  # nothing is missing


def test_what_was_dropped_is_not_foreseen(raw, weights, tmp_path):
    settings, store = settings_of(weights), EditStore(tmp_path / "edits")
    edits = list(plan_edits(raw, settings))
    dropped = Dropped(edits=frozenset(edit.key for edit in edits[:10]))
    left = forecast(plan_edits(raw, settings, dropped), store, NONE_JUDGED, COST)
    assert (left.edits, left.images) == (20, 20)
    just = COST.seconds(20)
    assert share_within(just, COST, raw, settings, store, None, dropped) == 1
    assert share_within(just, COST, raw, settings, store, None) < 1


def test_with_a_gate_the_edits_after_a_rejection_are_foreseen(raw, weights, tmp_path):
    settings = settings_of(weights, "editing.gate.enabled=true", "editing.gate.max_attempts=3")
    plan, store = plan_edits(raw, settings), EditStore(tmp_path / "edits")

    def judge(sources, originals, edits):
        """Accept cats alone, so half of all."""
        return [ACCEPTED if source.label == "cat" else "label" for source in sources]

    gate = LabelGate(judge, plan.verdicts(tmp_path / "gate"), lambda: 1)
    tries = 1 + 1 / 2 + 1 / 4
    half = replace(COST, accepted=0.5)
    left = forecast(plan, store, Verdicts(gate.verdicts), half)
    assert (left.edits, left.images) == (round(30 * tries), round(30 * (1 - 1 / 2**3)))
    assert left.seconds == sum(COST.seconds(round(30 / 2**time)) for time in range(3))
    cost = run_pilot(plan, store, device="cpu", gate=gate)
    assert cost is not None
    judged = [edit for edit in plan if edit.key in store]
    dogs = sum(edit.source.label == "dog" for edit in judged)
    assert cost.accepted == pytest.approx(1 - dogs / 24)
    # What was judged is not foreseen again: accepted, it is done; rejected, two tries are left.
    left = forecast(plan, store, Verdicts(gate.verdicts), half)
    assert left.edits == round(6 * tries + dogs * (1 + 1 / 2))
    assert left.images == round(6 * 7 / 8 + dogs * 3 / 4 + 24 - dogs)
    make_edits(plan, store=store, device="cpu", gate=gate)
    left = forecast(plan, store, Verdicts(gate.verdicts), half)
    assert (left.edits, left.images) == (0, 15)  # the dogs are given up
    store.remove(list(store))
    cats = [edit.key for edit in plan if edit.source.label == "cat"]
    assert {edit.key for edit in open_edits(plan, Verdicts(gate.verdicts))} == set()
    assert run_pilot(plan, store, device="cpu", gate=gate) is None  # and not made for a pilot
    assert make_edits(plan, store=store, device="cpu", gate=gate) == len(cats) == 15


@runs(max_examples=30, deadline=None)
@given(seconds=st.floats(0, 60))
def test_a_share_keeps_to_its_budget_and_is_the_largest_that_does(shared, seconds):
    raw, settings, store, cost = shared

    def predicted(share: float) -> float:
        editing = settings.editing.model_copy(update={"share": share})
        plan = plan_edits(raw, settings.model_copy(update={"editing": editing}))
        return cost.seconds(sum(edit.key not in store for edit in plan))

    share = share_within(seconds, cost, raw, settings, store, None)
    if share:
        assert predicted(share) <= seconds
    if share < 1:
        assert predicted(share + 0.01) > seconds


@pytest.fixture(scope="module")
def shared(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    source = write_classes(folder / "data", ["cat", "dog"], 15)
    wanted = settings_of(weights)
    aside = folder / "aside"
    raw = ingest(str(source), wanted, folder / "raw", aside=aside, train_only=True)
    return raw, wanted, EditStore(folder / "edits"), COST


def test_the_command_prints_the_cost_and_a_share(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_classes(tmp_path / "photos", ["cat", "dog"], 60)
    own = ["size=32", "editing.steps=2", "editing.batch_size=2", f"editing.editor={weights}"]
    sets = [word for each in own for word in ("--set", each)]
    result = CliRunner().invoke(main, ["plan", "--data", str(source), "--budget", "0.001s", *sets])
    assert result.exit_code == 0, result.output
    assert "still to be made" in result.output
    assert "Not even a hundredth" in result.output
    result = CliRunner().invoke(main, ["plan", "--data", str(source), "--budget", "9h", *sets])
    assert "All of it fits into 9 h 0 min" in result.output
    assert not (tmp_path / "data").exists()


def test_a_budget_that_is_no_duration_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["plan", "--budget", "soon"])
    assert result.exit_code == 2
    assert "'soon' is no duration" in result.output

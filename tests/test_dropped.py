"""Promise: what a person drops leaves the dataset, for good, by name, and without a new edit."""

import shutil

import pytest
from click.testing import CliRunner
from conftest import quick_settings, tiny_editor, write_classes
from PIL import Image

from diffusemix_pipeline.cli import main
from diffusemix_pipeline.datasets.dropped import NOTHING, Dropped, drop, read_dropped
from diffusemix_pipeline.datasets.ingest import ingest, leave_out
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.editing.gate import ACCEPTED
from diffusemix_pipeline.editing.generate import LabelGate, collect_edits, make_edits, prepare
from diffusemix_pipeline.editing.planning import plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.settings import Storage


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("source"), ["cat", "dog"], 12)


def raw_of(source, folder, dropped: Dropped = NOTHING, *overrides: str) -> Stage:
    asked = ["source.val_fraction=0.2", "source.test_fraction=0.2", *overrides]
    settings = quick_settings("source.train_per_class=null", *asked)
    return ingest(str(source), settings, folder, aside=folder.parent / "aside", dropped=dropped)


def tombstone(row) -> tuple[str, str]:
    return row["source_sha256"], f"{row['split']}/{row['label']}"


def a_train_row(raw: Stage, number: int = 0) -> dict:
    return raw.manifest().query("split == 'train'").iloc[number].to_dict()


def test_a_dropped_source_goes_and_no_other_image_moves(source, tmp_path):
    before = raw_of(source, tmp_path / "raw")
    rows, gone = before.manifest(), a_train_row(before)
    after = raw_of(source, tmp_path / "raw", Dropped(frozenset({tombstone(gone)})))
    left = rows.query("image_id != @gone['image_id']")
    assert after.manifest().equals(left.reset_index(drop=True))
    assert after.version != before.version
    assert not (after.folder / gone["file_name"]).exists()
    [noted] = after.notes["dropped"]
    assert noted == {"label": gone["label"], "split": "train", "sha256": gone["sha256"]}
    assert raw_of(source, tmp_path / "raw").version == before.version  # and it comes back


def test_where_images_a_class_are_limited_none_takes_the_place_of_a_dropped_one(source, tmp_path):
    limit = "source.train_per_class=3"
    before = raw_of(source, tmp_path / "raw", NOTHING, limit).manifest()
    gone = before.query("split == 'train'").iloc[0]
    dropped = Dropped(frozenset({tombstone(gone)}))
    after = raw_of(source, tmp_path / "raw", dropped, limit).manifest()
    assert len(after) == len(before) - 1


def test_what_is_dropped_but_not_there_changes_nothing(source, tmp_path):
    before = raw_of(source, tmp_path / "raw")
    again = raw_of(source, tmp_path / "raw", Dropped(frozenset({("0" * 64, "train/cat")})))
    assert again.reused
    assert again.version == before.version


def test_a_class_cannot_be_dropped_whole(source, tmp_path):
    rows = raw_of(source, tmp_path / "raw").manifest()
    is_cat = (rows["label"] == "cat") & (rows["split"] == "train")
    cats = frozenset(tombstone(row) for _, row in rows[is_cat].iterrows())
    with pytest.raises(UserError, match="class cat without a training image"):
        raw_of(source, tmp_path / "raw", Dropped(cats))
    of_test = rows[rows["split"] == "test"]
    test = frozenset(tombstone(row) for _, row in of_test.iterrows())
    with pytest.raises(UserError, match="test without images"):
        raw_of(source, tmp_path / "raw", Dropped(test))


def test_images_that_come_pinned_lose_what_was_dropped_as_well(source, tmp_path):
    raw = raw_of(source, tmp_path / "raw")
    gone = a_train_row(raw)
    dropped = Dropped(frozenset({tombstone(gone)}))
    ingested = raw_of(source, tmp_path / "other", dropped)
    left = leave_out(raw, dropped, Storage(), aside=tmp_path / "aside")
    assert left.version == ingested.version
    assert not (left.folder / gone["file_name"]).exists()
    assert left.notes["source"] == raw.notes["source"]
    assert leave_out(left, dropped, Storage(), aside=tmp_path / "aside") is left


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    return tiny_editor(tmp_path_factory.mktemp("editor"))


def made(raw: Stage, editor, folder, dropped: Dropped = NOTHING, gate=None):
    """Return the stage of edits, and how many were made for it."""
    settings = quick_settings(
        f"editing.editor={editor}", f"editing.gate.enabled={gate is not None}"
    )
    plan, store = plan_edits(raw, settings, dropped), EditStore(folder / "edits")
    judges = gate(plan) if gate else None
    lacking = prepare(plan, folder / "generated", store, judges).lacking
    paid = make_edits(lacking, store=store, device="cpu", gate=judges)
    verdicts = judges.verdicts if judges else None
    stage = collect_edits(plan, folder / "generated", store, verdicts, folder / "aside")
    return stage, paid


def test_dropped_edits_and_sources_make_a_new_version_without_a_new_edit(source, editor, tmp_path):
    raw = raw_of(source, tmp_path / "raw")
    before, paid = made(raw, editor, tmp_path)
    rows = before.manifest()
    assert paid == len(rows)
    edit = rows.iloc[3]
    after, paid = made(raw, editor, tmp_path, Dropped(edits=frozenset({edit["edit_key"]})))
    assert paid == 0
    left = rows.query("image_id != @edit['image_id']").reset_index(drop=True)
    assert after.manifest().equals(left)
    assert after.version != before.version
    assert not (after.folder / edit["file_name"]).exists()

    gone = a_train_row(raw)
    raw = raw_of(source, tmp_path / "raw", Dropped(frozenset({tombstone(gone)})))
    last, paid = made(raw, editor, tmp_path)
    assert paid == 0
    assert gone["image_id"] not in set(last.manifest()["source_id"])
    assert len(last.manifest()) == len(rows) - 1


def test_a_dropped_edit_that_the_store_lost_is_not_made_again(source, editor, tmp_path):
    raw = raw_of(source, tmp_path / "raw")
    edit = made(raw, editor, tmp_path)[0].manifest().iloc[0]
    shutil.rmtree(tmp_path / "edits")
    shutil.rmtree(tmp_path / "generated")
    dropped = Dropped(edits=frozenset({edit["edit_key"]}))
    after, paid = made(raw, editor, tmp_path, dropped)
    assert paid == len(after.manifest())
    assert edit["edit_key"] not in EditStore(tmp_path / "edits")


def test_a_gate_judges_nothing_anew_for_a_dropped_image(source, editor, tmp_path):
    asked, fitted = [], []

    def gate(plan) -> LabelGate:
        def judge(sources, originals, edits):
            asked.extend(source.image_id for source in sources)
            # One image's first attempt is rejected: its edit in the stage is the second.
            first = asked.count(odd["image_id"]) == 1
            return [
                "label" if first and source.image_id == odd["image_id"] else ACCEPTED
                for source in sources
            ]

        return LabelGate(
            judge, plan.verdicts(tmp_path / "gate"), lambda: fitted.append(plan) or 1.0
        )

    raw = raw_of(source, tmp_path / "raw")
    odd = a_train_row(raw, 1)
    before, paid = made(raw, editor, tmp_path, gate=gate)
    rows = before.manifest()
    assert paid >= len(rows)
    assert len(fitted) == 1
    asked.clear()
    fitted.clear()
    [edit] = rows[rows["source_id"] == odd["image_id"]].to_dict("records")
    assert edit["attempt"] == 1
    gone = a_train_row(raw, 5)
    dropped = Dropped(frozenset({tombstone(gone)}), frozenset({edit["edit_key"]}))
    left = raw_of(source, tmp_path / "raw", dropped)
    settings = quick_settings(f"editing.editor={editor}", "editing.gate.enabled=true")
    assert (
        plan_edits(left, settings).gate == plan_edits(raw_of(source, tmp_path / "o"), settings).gate
    )
    after, paid = made(left, editor, tmp_path, dropped, gate)
    assert (paid, asked, fitted) == (0, [], [])
    assert len(after.manifest()) == len(rows) - 2


def test_a_dropped_edit_ends_the_attempts_whatever_the_gate_says(source, editor, tmp_path):
    """One edit serves two labels: dropped, neither of them wants another attempt of it."""
    both_labels = shutil.copytree(source, tmp_path / "both")
    cat = a_train_row(raw_of(source, tmp_path / "before"))
    assert cat["label"] == "cat"
    shutil.copy(source / cat["source_id"], both_labels / "dog")
    raw = raw_of(both_labels, tmp_path / "raw")

    seen = set()

    def gate(plan) -> LabelGate:
        def judge(sources, originals, edits):
            """Reject a dog's first attempt."""
            new = [s.label == "dog" and s.image_id not in seen for s in sources]
            seen.update(source.image_id for source in sources)
            return ["label" if one else ACCEPTED for one in new]

        return LabelGate(judge, plan.verdicts(tmp_path / "gate"), lambda: 1.0)

    before, _ = made(raw, editor, tmp_path, gate=gate)
    rows = before.manifest()
    [edit] = rows[rows["source_id"] == cat["image_id"]].to_dict("records")
    dropped = Dropped(edits=frozenset({edit["edit_key"]}))
    after, paid = made(raw, editor, tmp_path, dropped, gate)
    assert paid == 0
    assert len(after.manifest()) == len(rows) - 2  # for each of the labels


def test_tombstones_are_lines_that_a_person_can_read_and_delete(source, tmp_path):
    raw = raw_of(source, tmp_path / "raw")
    row, file = a_train_row(raw), tmp_path / "dropped.txt"
    assert read_dropped(file) == NOTHING
    [line] = drop(file, [row["image_id"]], [raw.folder, tmp_path / "generated"])
    assert line == f"source {row['source_sha256']} {row['image_id']}"
    assert read_dropped(file) == Dropped(frozenset({tombstone(row)}))
    assert drop(file, [row["image_id"]], [raw.folder]) == []  # once is enough
    assert drop(file, [row["source_id"]], [raw.folder]) == []  # by its name in the source folder
    with pytest.raises(UserError, match="No stage in data/ has an image 'cat/no'"):
        drop(file, ["cat/no"], [raw.folder])
    file.write_text(f"# why: blurred\n\n{line}\nedit {'ab' * 16}\n")
    assert read_dropped(file).edits == {"ab" * 16}
    assert len(drop(file, [a_train_row(raw, 2)["image_id"]], [raw.folder])) == 1
    assert "# why: blurred" in file.read_text()
    file.write_text("cat/1\n")
    with pytest.raises(UserError, match="line 1"):
        read_dropped(file)
    for mark in ("\u2028", "\x85", "\x0b"):  # which other programs take for the end of a line
        file.write_text(f"source {'0' * 64} train/a{mark}b/x-01234567\n", encoding="utf-8")
        assert read_dropped(file).sources == {("0" * 64, f"train/a{mark}b")}


def test_the_command_drops_by_image_id(source, editor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = raw_of(source, tmp_path / "data" / "raw")
    stage, _ = made(raw, editor, tmp_path / "data")
    edit, image = stage.manifest().iloc[0], a_train_row(raw, 4)
    done = CliRunner().invoke(main, ["drop", edit["image_id"], image["image_id"]])
    assert done.exit_code == 0, done.output
    assert f"Dropped the edit {edit['image_id']}" in done.output
    assert f"Dropped the source {image['image_id']}" in done.output
    found = read_dropped(tmp_path / "dropped.txt")
    assert found == Dropped({tombstone(image)}, {edit["edit_key"]})
    assert CliRunner().invoke(main, ["drop", "nothing"]).exit_code == 2


def test_copies_in_another_split_or_class_stay(tmp_path):
    source = write_classes(tmp_path / "source" / "train", ["cat", "dog"], 6).parent
    write_classes(source / "val", ["cat", "dog"], 2, seed=50)
    write_classes(source / "test", ["cat", "dog"], 2, seed=70)
    picture = (source / "train" / "cat" / "0.png").read_bytes()
    for copy in ("train/dog", "test/cat"):
        (source / copy / "copy.png").write_bytes(picture)
    raw = raw_of(source, tmp_path / "raw")
    rows = raw.manifest()
    [gone] = rows[rows["source_id"] == "train/cat/0.png"].to_dict("records")
    assert len(raw.notes["copies_across_splits"]) == 2
    dropped = Dropped(frozenset({tombstone(gone)}))
    whole = raw_of(source, tmp_path / "pinned")
    pinned = leave_out(whole, dropped, Storage(), aside=tmp_path / "aside")
    for left in (raw_of(source, tmp_path / "raw", dropped), pinned):
        ids = set(left.manifest()["source_id"])
        assert ids == set(rows["source_id"]) - {"train/cat/0.png"}
        [copies] = left.notes["copies_across_splits"]
        assert copies["image"] == "train/dog/copy.png"


@pytest.mark.parametrize("kind", ["L", "BMP"])
def test_a_gate_is_the_same_after_a_drop_whatever_the_files_are(tmp_path, editor, kind):
    source = write_classes(tmp_path / "source", ["cat", "dog"], 8)
    for path in list(source.rglob("*.png")):  # such files are stored as other bytes
        image = Image.open(path)
        if kind == "L":
            image.convert("L").save(path)
        else:
            image.save(path.with_suffix(".bmp"))
            path.unlink()
    settings = quick_settings(f"editing.editor={editor}", "editing.gate.enabled=true")
    before = raw_of(source, tmp_path / "raw")
    gate, gone = plan_edits(before, settings).gate, a_train_row(before)
    after = raw_of(source, tmp_path / "raw", Dropped(frozenset({tombstone(gone)})))
    assert len(after.notes["dropped"]) == 1
    assert plan_edits(after, settings).gate == gate

"""Promise: files or shards, in however many parts, hold the same images; a part is made once."""

import hashlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import quick_settings, wait_for, write_classes, write_edits
from PIL import Image
from test_dropped import tombstone

from diffusemix_pipeline import workers
from diffusemix_pipeline.datasets import ingest as ingest_module
from diffusemix_pipeline.datasets import parts
from diffusemix_pipeline.datasets.dropped import Dropped
from diffusemix_pipeline.datasets.ingest import ingest, leave_out
from diffusemix_pipeline.datasets.manifest import Stage, read_stage
from diffusemix_pipeline.datasets.parts import Part, write_stage
from diffusemix_pipeline.datasets.storage import INDEX, Layout, StoredFiles, member_name, read_index
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import clear_aside
from diffusemix_pipeline.mixing.stages import make_augmented, make_hybrids
from diffusemix_pipeline.settings import Settings

LAYOUTS = {
    "files": (),
    "files in parts": ("storage.shard_images=8",),
    "one shard": ("storage.format=tar",),
    "shards": ("storage.format=tar", "storage.shard_images=8"),
}


def asked(*overrides: str) -> Settings:
    return quick_settings("source.train_per_class=null", "source.val_fraction=0.2", *overrides)


def stages(source: Path, folder: Path, settings: Settings) -> dict[str, Stage]:
    """Ingest, edit (each image's negative) and mix."""
    aside = folder / "aside"
    raw = ingest(str(source), settings, folder / "raw", aside=aside)
    generated = write_edits(raw, folder / "generated", aside=aside)
    hybrid = make_hybrids(raw, generated, settings, folder / "hybrid", aside=aside)
    augmented = make_augmented(
        raw,
        generated,
        settings,
        folder / "augmented",
        fractal_cache=folder / "fractals",
        aside=aside,
    )
    assert not list(aside.iterdir())
    return {"raw": raw, "hybrid": hybrid, "augmented": augmented}


def contents(stage: Stage) -> dict[str, bytes]:
    return {name: stage.files.read(name) for name in stage.manifest()["file_name"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("source"), ["cat", "dog", "St. Bernard"], 16)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> dict[str, dict[str, Stage]]:
    folder = tmp_path_factory.mktemp("made")
    return {
        name: stages(source, folder / name, asked(*overrides))
        for name, overrides in LAYOUTS.items()
    }


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("name", ["raw", "hybrid", "augmented"])
def test_every_layout_holds_the_same_images_in_the_same_version(made, layout, name):
    stage, plain = made[layout][name], made["files"][name]
    assert stage.version == plain.version
    assert contents(stage) == contents(plain)
    pd.testing.assert_frame_equal(stage.manifest(), plain.manifest())
    assert stage.files.packed == ("shard" in layout)
    assert stage.files.sizes(contents(stage)) == sum(map(len, contents(stage).values()))


def test_a_dataset_falls_into_parts_of_about_the_size_that_was_asked_for(made):
    raw = made["shards"]["raw"]
    counts = {split: sum(of.values()) for split, of in raw.counts["by_split"].items()}
    assert sum(counts.values()) == 48
    for split, count in counts.items():
        number = raw.layout["parts"][split]
        assert count / 8 <= number < 2 * max(1, count / 8)
        assert len(list(raw.folder.glob(f"{split}-*.tar"))) <= number
    assert raw.layout["parts"]["train"] >= 4
    assert {path.name for path in made["one shard"]["raw"].folder.glob("*.tar")} == {
        "train-000000.tar", "val-000000.tar", "test-000000.tar",
    }  # fmt: skip
    large = Layout.of({"train": 100_000, "test": 900}, asked().storage)
    assert (large.packed, large.parts) == (True, {"train": 128, "test": 1})
    assert not Layout.of({"train": 10_000, "test": 900}, asked().storage).packed


def test_one_more_image_makes_one_part_of_each_stage_anew(source, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    for image in source.rglob("*.png"):
        target = photos / "train" / image.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.read_bytes())
    write_classes(photos / "val", ["cat", "dog"], 3, seed=20_000)
    write_classes(photos / "test", ["cat", "dog"], 3, seed=30_000)
    settings = asked("storage.format=tar", "storage.shard_images=8")
    before = stages(photos, tmp_path, settings)
    inodes = {path: path.stat().st_ino for path in tmp_path.glob("*/*.tar")}
    write_classes(tmp_path / "more", ["cat"], 1, seed=40_000)
    (tmp_path / "more" / "cat" / "0.png").rename(photos / "train" / "cat" / "new.png")
    after = stages(photos, tmp_path, settings)
    assert after["augmented"].counts["images"] == before["augmented"].counts["images"] + 1
    [new] = after["raw"].manifest().query("source_id == 'train/cat/new.png'")["image_id"]
    part = Layout.of({"train": 49, "val": 6, "test": 6}, settings.storage).part_of("train", new)
    moved = [path for path, inode in inodes.items() if path.stat().st_ino != inode]
    assert {path.relative_to(tmp_path).as_posix() for path in moved} == {
        f"{stage}/{part}.tar" for stage in ("raw", "hybrid", "augmented")
    }


class KilledError(Exception):
    pass


@pytest.mark.parametrize("layout", ["files in parts", "shards"])
def test_what_was_made_before_a_cut_off_is_not_made_again(
    made, source, tmp_path, monkeypatch, layout
):
    monkeypatch.setattr(workers, "usable_cores", lambda: 1)
    monkeypatch.setattr(parts, "_WORTH_PROCESSES", 10)
    done: list[str] = []
    make = parts._Maker.__call__

    def once_killed(self, part, *how):
        if len(done) == 3:
            done.append("killed")
            raise KilledError
        done.append(part.name)
        return make(self, part, *how)

    monkeypatch.setattr(parts._Maker, "__call__", once_killed)
    settings, aside = asked(*LAYOUTS[layout]), tmp_path / "aside"
    with pytest.raises(KilledError):
        ingest(str(source), settings, tmp_path / "raw", aside=aside)
    assert not (tmp_path / "raw").exists()
    raw = ingest(str(source), settings, tmp_path / "raw", aside=aside)
    assert raw.version == made["files"]["raw"].version
    assert len(done) == len(set(done))  # none twice
    assert not list(aside.iterdir())


def test_processes_and_threads_change_no_byte(source, tmp_path, monkeypatch):
    settings = asked(*LAYOUTS["shards"])
    monkeypatch.setattr(workers, "usable_cores", lambda: 1)
    alone = stages(source, tmp_path / "alone", settings)
    monkeypatch.setattr(workers, "usable_cores", lambda: 3)
    monkeypatch.setattr(parts, "_WORTH_PROCESSES", 10)
    several = stages(source, tmp_path / "several", settings)
    for name, stage in alone.items():
        shards = [path.name for path in stage.folder.glob("*.tar")]
        for file in (*shards, "stage.json", "manifest.parquet", "shards.parquet", "_info.json"):
            assert (stage.folder / file).read_bytes() == (several[name].folder / file).read_bytes()


def test_another_layout_is_written_anew_without_another_version(source, tmp_path):
    plain = ingest(str(source), asked(), tmp_path / "raw", aside=tmp_path / "aside")
    packed = ingest(
        str(source), asked("storage.format=tar"), tmp_path / "raw", aside=tmp_path / "aside"
    )
    assert (packed.reused, packed.version) == (False, plain.version)
    assert {path.suffix for path in packed.folder.iterdir()} == {".tar", ".json", ".parquet"}
    again = ingest(
        str(source), asked("storage.format=tar"), tmp_path / "raw", aside=tmp_path / "aside"
    )
    assert again.reused


def test_a_missing_or_changed_shard_is_noticed(source, tmp_path):
    settings = asked("storage.format=tar")
    raw = ingest(str(source), settings, tmp_path / "raw", aside=tmp_path / "aside")
    assert raw.differences() == (3, [], [], [])
    rows = raw.manifest(["file_name", "split"])
    changed = rows.loc[rows["split"] == "val", "file_name"].iloc[0]
    shard = raw.folder / "val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(raw.files.read(changed)) + 20] ^= 1
    shard.write_bytes(content)
    (raw.folder / "note.txt").write_text("mine")
    (raw.folder / "test-000000.tar").unlink()
    gone = sorted(rows.loc[rows["split"] == "test", "file_name"])
    assert raw.differences() == (3, ["note.txt"], gone, [changed])
    again = ingest(str(source), settings, tmp_path / "raw", aside=tmp_path / "aside")
    assert not again.reused
    assert (raw.folder / "test-000000.tar").exists()


def test_an_index_of_another_shard_is_noticed(source, tmp_path):
    settings = asked("storage.format=tar")
    raw = ingest(str(source), settings, tmp_path / "raw", aside=tmp_path / "aside")
    index = pd.read_parquet(raw.folder / INDEX)
    index["offset"] += 512
    index.to_parquet(raw.folder / INDEX, index=False)
    assert len(read_stage(raw.folder).differences().changed) == len(raw.manifest())


@pytest.mark.parametrize("shard", ["../train-000000.tar", "/etc/passwd", "a/train-000000.tar"])
def test_an_index_names_no_file_outside_of_its_folder(shard, source, tmp_path):
    settings = asked("storage.format=tar")
    raw = ingest(str(source), settings, tmp_path / "raw", aside=tmp_path / "aside")
    index = pd.read_parquet(raw.folder / INDEX)
    index["shard"] = index["shard"].cat.rename_categories({"train-000000.tar": shard})
    index.to_parquet(raw.folder / INDEX, index=False)
    for read in (lambda: StoredFiles(raw.folder).packed, lambda: read_index(raw.folder)):
        with pytest.raises(UserError, match=f"names {shard}, which is no shard beside it"):
            read()


def test_bytes_that_their_row_does_not_tell_of_are_not_packed(made, tmp_path):
    raw = made["files"]["raw"]
    [row] = raw.manifest().head(1).to_dict("records")
    part = Part("train-000000", "f", [(row, b"other bytes")], 1)
    layout = Layout(True, {"train": 1})
    labels = ["St. Bernard", "cat", "dog"]
    with (
        pytest.raises(UserError, match=f"{row['image_id']} are no longer those"),
        write_stage(
            tmp_path / "out",
            name="raw",
            fingerprint="f",
            layout=layout,
            classes=labels,
            aside=tmp_path / "aside",
        ) as stage,
    ):
        stage.write([part], lambda work, threads: work, total=1, describe="Packing")
    assert not (tmp_path / "out").exists()


SLOW_STAGE = """
import sys, time
from pathlib import Path
from diffusemix_pipeline import workers
from diffusemix_pipeline.datasets import parts
from diffusemix_pipeline.datasets.storage import Layout


def make(number, threads):
    image = f"train/all/{number}"
    content = bytes([number]) * 100
    time.sleep(1)
    sha256 = parts.hashlib.sha256(content).hexdigest()
    row = dict(image_id=image, file_name=f"{image}.png", label="all", split="train")
    yield row | dict(source_id=image, source_sha256=sha256, sha256=sha256), content


if __name__ == "__main__":
    here = Path(sys.argv[1])
    workers.usable_cores = lambda: 2
    wanted = [parts.Part(f"train-{n:06d}", f"fingerprint-{n}", n, 200) for n in range(6)]
    layout = Layout(True, {"train": 8})
    with parts.write_stage(
        here / "out", name="raw", fingerprint="f", layout=layout, classes=["all"], aside=here / "a"
    ) as stage:
        stage.write(wanted, make, total=6, describe="Making")
"""


def test_workers_end_with_whoever_started_them(tmp_path):
    script = tmp_path / "slow_stage.py"
    script.write_text(SLOW_STAGE)
    command, begun = [sys.executable, script, tmp_path], tmp_path / "a" / "out.begun"
    running = subprocess.Popen(command)
    wait_for(lambda: running.poll() is not None or list(begun.glob("fingerprint-*")))
    workers_of_it = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    left = psutil.wait_procs(workers_of_it, timeout=20)[1]
    assert len(workers_of_it) >= 2
    assert not left
    made_before = {path: path.stat().st_mtime_ns for path in begun.glob("fingerprint-*/*")}
    assert 0 < len(made_before) < 6 * 3
    subprocess.run(command, check=True)
    assert read_stage(tmp_path / "out").counts["images"] == 6
    assert not begun.exists()


def test_what_was_checked_before_a_cut_off_is_not_checked_again(source, tmp_path, monkeypatch):
    looked = ingest_module._looked_at
    seen: list[str] = []

    def killed_at(last: int):
        def look(max_pixels, listing):
            if len(seen) == last:
                raise KilledError
            seen.extend(listing.rows["source_id"])
            return looked(max_pixels, listing)

        return look

    monkeypatch.setattr(ingest_module, "_CHECKED_AT_ONCE", 10)
    monkeypatch.setattr(ingest_module, "_looked_at", killed_at(30))
    with pytest.raises(KilledError):
        ingest(str(source), asked(), tmp_path / "raw", aside=tmp_path / "aside")
    clear_aside(tmp_path / "aside")
    monkeypatch.setattr(ingest_module, "_looked_at", killed_at(-1))
    raw = ingest(str(source), asked(), tmp_path / "raw", aside=tmp_path / "aside")
    assert len(seen) == len(set(seen)) == raw.counts["images"] == 48
    assert not list((tmp_path / "aside").iterdir())


def test_processes_check_as_one_does(source, tmp_path, monkeypatch):
    photos = shutil.copytree(source, tmp_path / "photos")
    (photos / "cat" / "broken.png").write_bytes(b"no picture")
    shutil.copy(photos / "cat" / "3.png", photos / "cat" / "again.png")
    alone = ingest(str(photos), asked(), tmp_path / "alone", aside=tmp_path / "aside")
    monkeypatch.setattr(ingest_module, "_CHECKED_AT_ONCE", 5)
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    several = ingest(str(photos), asked(), tmp_path / "several", aside=tmp_path / "aside")
    assert len(alone.notes["set_aside"]) == 2
    for name in ("stage.json", "manifest.parquet", "checked.parquet"):
        assert (several.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_a_dropped_image_changes_its_own_shard_alone(source, tmp_path):
    settings = asked(*LAYOUTS["shards"])
    raw = ingest(str(source), settings, tmp_path / "raw", aside=tmp_path / "aside")
    shards = {path.name: path.read_bytes() for path in raw.folder.glob("*.tar")}
    [gone] = raw.manifest().query("split == 'train'").head(1).to_dict("records")
    dropped = Dropped(frozenset({tombstone(gone)}))
    left = leave_out(raw, dropped, settings.storage, aside=tmp_path / "aside")
    changed = {n for n, content in shards.items() if (left.folder / n).read_bytes() != content}
    part = Layout(True, raw.layout["parts"]).part_of("train", gone["image_id"])
    assert changed == {f"{part}.tar"}
    anew = ingest(
        str(source), settings, tmp_path / "anew", aside=tmp_path / "aside", dropped=dropped
    )
    assert (anew.folder / f"{part}.tar").read_bytes() == (left.folder / f"{part}.tar").read_bytes()


def test_a_pinned_dataset_in_another_layout_has_each_image_in_its_own_part(source, tmp_path):
    photos = shutil.copytree(source, tmp_path / "photos")
    short = photos / "cat" / "im.png"
    (photos / "cat" / "3.png").rename(short)
    sha256 = hashlib.sha256(short.read_bytes()).hexdigest()
    # `-` comes before the `.` of a suffix: by id this is the second of the two, by name the first.
    (photos / "cat" / "5.png").rename(photos / "cat" / f"im-{sha256[:16]}.png")
    files, aside = asked("storage.shard_images=8"), tmp_path / "aside"
    raw = ingest(str(photos), files, tmp_path / "raw", aside=aside)
    shards = asked(*LAYOUTS["shards"])
    packed = leave_out(raw, Dropped(), shards.storage, aside=aside)
    anew = ingest(str(photos), shards, tmp_path / "anew", aside=aside)
    for name, part in anew.parts.items():
        assert packed.parts[name].version == part.version
    assert (packed.folder / "checked.parquet").exists()


def test_a_stage_whose_writer_died_between_two_renames_is_put_back(source, tmp_path, monkeypatch):
    raw, aside = tmp_path / "raw", tmp_path / "aside"
    before = ingest(str(source), asked(), raw, aside=aside)
    renamed, rename = [], Path.rename

    def killed_at_the_second(path, target):
        if raw in (path, Path(target)):
            renamed.append(target)
            if len(renamed) == 2:
                raise KilledError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KilledError):
        ingest(str(source), asked("seed=7"), raw, aside=aside)
    monkeypatch.undo()
    assert not raw.exists()
    clear_aside(aside, [raw, tmp_path / "other"])
    assert read_stage(raw).version == before.version
    assert contents(read_stage(raw)) == contents(before)


def test_what_was_half_written_goes_when_its_stage_is_written_again(tmp_path):
    half = tmp_path / "aside" / "raw.begun" / "train-000000.1a2b3c4d"
    half.mkdir(parents=True)
    (half / "shard.tar").write_bytes(b"half")

    def killed(work, threads):
        assert not half.exists()
        raise KilledError

    writing = write_stage(
        tmp_path / "raw",
        name="raw",
        fingerprint="f",
        layout=Layout(False, {"train": 1}),
        classes=["cat"],
        aside=tmp_path / "aside",
    )
    with pytest.raises(KilledError), writing as stage:
        stage.write([Part("train-000000", "p", None, 1)], killed, total=1, describe="Dying")


def test_a_file_that_is_not_there_is_named(made):
    for stage in (made["files"]["raw"], made["shards"]["raw"]):
        with pytest.raises(FileNotFoundError, match="nothing"):
            StoredFiles(stage.folder).read("train/cat/nothing.png")


def test_webdataset_reads_shards_as_they_are(made):
    import webdataset

    stage = made["shards"]["augmented"]
    shards = sorted(str(path) for path in stage.folder.glob("*.tar"))
    read = list(webdataset.WebDataset(shards, shardshuffle=False).to_tuple("__key__", "png", "cls"))
    rows = stage.manifest()
    classes = sorted(rows["label"].unique())
    expected = {
        member_name(row.file_name).removesuffix(".png"): (row.sha256, classes.index(row.label))
        for row in rows.itertuples()
    }
    assert {
        key: (hashlib.sha256(content).hexdigest(), int(label)) for key, content, label in read
    } == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_timm_reads_shards_as_they_are(made, split):
    from timm.data import create_dataset

    raw = made["shards"]["raw"]
    rows = raw.manifest().query("split == @split")
    dataset = create_dataset("wds/", root=str(raw.folder), split=split)
    assert len(dataset) == len(rows)
    read = [(image.tobytes(), label) for image, label in dataset]
    classes = sorted(rows["label"].unique())
    expected = [
        (Image.open(io.BytesIO(raw.files.read(row.file_name))).tobytes(), classes.index(row.label))
        for row in rows.itertuples()
    ]
    assert sorted(read) == sorted(expected)

"""docs/extending.md: its files run as they are, and what is wrong with such a file is told."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import quick_settings, tiny_editor, write_classes
from PIL import Image

from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.sources import listing_version
from diffusemix_pipeline.editing.editor import editor_fingerprint, locate_editor
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.orchestration.launch import Outcome, run_here
from diffusemix_pipeline.own_code import own_code
from diffusemix_pipeline.preflight import check_run
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.training.augmentations import own_version

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = ("filters", "table", "autoaugment")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the three files, and pictures that the table lists."""
    for name in EXAMPLES:
        shutil.copy(DOCS / "extending" / f"{name}.py", tmp_path)
    write_classes(tmp_path, ["cat", "dog"], 6)
    rows = ["file,label,split"]
    rows += [
        f"{c}/{n}.png,{c},{'test' if n == 5 else ''}" for c in ("cat", "dog") for n in range(6)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return tmp_path


def run(folder: Path, *overrides: str) -> Outcome:
    project = Project(folder / "project")
    project.root.mkdir(exist_ok=True)
    return run_here(project, quick_settings(*overrides), silent)


def test_the_page_shows_the_files_as_they_are() -> None:
    page = (DOCS / "extending.md").read_text("utf-8")
    for name in EXAMPLES:
        code = (DOCS / "extending" / f"{name}.py").read_text("utf-8")
        assert len(code.splitlines()) < 40
        assert f"```python\n{code}```" in page


def test_an_editor_a_dataset_and_an_arm_of_ones_own_go_through_the_pipeline(own):
    wanted = [
        f"source.path={own / 'table.py'}",
        f"editing.editor={own / 'filters.py'}",
        "editing.prompts=[emboss, solarize]",
        "editing.template='{prompt}'",
        f"training.arms=[vanilla, {own / 'autoaugment.py'}, diffusemix]",
    ]
    outcome = run(own, *wanted)
    assert outcome.success, outcome.problems
    project = Project(own / "project")
    raw = pd.read_parquet(project.raw / "manifest.parquet")
    assert set(raw.query("split == 'test'")["source_id"]) == {"cat/5.png", "dog/5.png"}
    edits = pd.read_parquet(project.generated / "manifest.parquet")
    assert set(edits["prompt"]) <= {"emboss", "solarize"}
    report = json.loads((project.report / "report.json").read_text("utf-8"))
    arms = [arm["arm"] for arm in report["arms"]]
    assert arms == ["vanilla", "diffusemix", str(own / "autoaugment.py")]
    assert report["shared_families"]["unknown_arms"] == [str(own / "autoaugment.py")]
    page = (project.report / "index.html").read_text("utf-8")
    assert "What these arms are shown in training is not known: " in page

    assert run(own, *wanted).reused, "nothing changed, nothing done"


def test_changed_bytes_run_at_once_and_nothing_is_written_beside_them(own):
    file = own / "number.py"
    for number in (1, 2):  # of one size, within one second
        file.write_text(f"NUMBER = {number}")
        assert own_code("editing.editor", str(file), "NUMBER") == number
    assert not (own / "__pycache__").exists()


@pytest.mark.parametrize("folder", ["data", "outputs", ".diffusemix"])
def test_what_came_with_data_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "evil.py").write_text("open('was run', 'w')")
    with pytest.raises(UserError, match="lies where only the pipeline writes"):
        own_code("editing.editor", f"{folder}/evil.py", "Editor")
    assert not (tmp_path / "was run").exists()


def test_what_came_with_data_is_not_run_where_that_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "disk" / "pool").mkdir(parents=True)
    (tmp_path / "disk" / "pool" / "own.py").write_text("NUMBER = 1")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data.dvc").touch()
    (tmp_path / "project" / "data").symlink_to(tmp_path / "disk" / "pool")
    monkeypatch.chdir(tmp_path / "project")
    for name in ("data/own.py", "../disk/pool/own.py"):
        with pytest.raises(UserError, match="lies where only the pipeline writes"):
            own_code("editing.editor", name, "NUMBER")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="lies where only the pipeline writes"):
        own_code("editing.editor", "project/data/own.py", "NUMBER")


def test_what_came_with_another_projects_data_is_not_run_either(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    (theirs / "data" / "raw").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (file := theirs / "data" / "raw" / "own.py").write_text("NUMBER = 1")
    assert own_code("editing.editor", str(file), "NUMBER") == 1  # a folder that is called data
    (theirs / "data.dvc").touch()
    with pytest.raises(UserError, match="lies where only the pipeline writes"):
        own_code("editing.editor", str(file), "NUMBER")


@pytest.mark.parametrize("name", ["filters", "autoaugment"])
def test_a_changed_file_is_another_thing(name, own):
    def identity() -> str:
        file = own / f"{name}.py"
        if name == "filters":
            return editor_fingerprint(locate_editor(str(file), None), None)
        return own_version(str(file))

    before = identity()
    assert identity() == before
    with (own / f"{name}.py").open("a") as file:
        file.write("# changed\n")
    assert identity() != before


def test_new_images_of_a_listed_dataset_are_seen(own):
    source = str(own / "table.py")
    before = listing_version(source)
    assert listing_version(source) == before
    with (own / "labels.csv").open("a") as table:
        table.write("\ncat/more.png,cat,")
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(own / "cat/more.png")
    after = listing_version(source)
    assert after != before
    table = own / "labels.csv"
    table.write_text(table.read_text().replace("cat/more.png,cat", "cat/more.png,dog"))
    assert listing_version(source) != after, "a corrected label is a change"


def test_what_is_listed_and_not_there_is_set_aside(own):
    os.mkfifo(own / "cat/pipe.png")
    with (own / "labels.csv").open("a") as table:
        table.write("\ncat/gone.png,cat,\ncat/pipe.png,cat,")
    assert listing_version(str(own / "table.py"))
    stage = ingest(str(own / "table.py"), quick_settings(), own / "raw", aside=own / "aside")
    aside = {item["source_id"]: item["reason"] for item in stage.notes["set_aside"]}
    assert aside.keys() == {"cat/gone.png", "cat/pipe.png"}


WRONG_ROWS = {
    '"../secret.png", "cat", None': "which lies outside of",
    '"/etc/passwd", "cat", None': "which lies outside of",
    '"cat/0.png", "../cat", None': "can be no folder's name",
    '"cat/0.png", "", None': "can be no folder's name",
    '"cat/0.png", "cat", "dev"': "the split 'dev', which is none of train, val, test",
    '"cat/0.png", "cat"': r"table.py fails \(ValueError: .*\)\. Mend it",
}


@pytest.mark.parametrize("row", WRONG_ROWS)
def test_what_a_listed_dataset_gives_is_looked_through(row, own):
    (own / "table.py").write_text(f"def images():\n    yield {row}\n")
    with pytest.raises(UserError, match=WRONG_ROWS[row]):
        ingest(str(own / "table.py"), quick_settings(), own / "raw", aside=own / "aside")


def test_python_among_the_images_is_not_run(own, tmp_path):
    marker = tmp_path / "was run"
    for name in ("cat/evil.py", "evil.py"):
        (own / name).write_text(f"open({str(marker)!r}, 'w')")
    with (own / "labels.csv").open("a") as table:
        table.write("\ncat/evil.py,cat,")
    for source in (own, own / "table.py"):
        stage = ingest(str(source), quick_settings(), own / "raw", aside=own / "aside")
        assert "cat/evil.py" in {item["source_id"] for item in stage.notes["set_aside"]}
    assert not marker.exists()


def test_an_image_is_listed_once(own):
    (own / "table.py").write_text(
        'def images():\n    yield "cat/0.png", "cat", None\n    yield "cat/0.png", "dog", None\n'
    )
    with pytest.raises(UserError, match=r"cat/0\.png twice"):
        ingest(str(own / "table.py"), quick_settings(), own / "raw", aside=own / "aside")


SETTINGS = {
    "editing.editor": ("{}", "Editor"),
    "source.path": ("{}", "images"),
    "training.arms": ("[vanilla, {}]", "augmentation"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("code", "told"),
    [
        (None, "there is no file .*own.py. Name one that defines {}"),
        ("1 / 0", r".*own.py fails \(ZeroDivisionError: division by zero\). Mend it"),
        ("def", r".*own.py fails \(SyntaxError: .*\). Mend it"),
        ("x = 1", ".*own.py defines no {}. See docs/extending.md"),
    ],
)
def test_a_file_that_is_none_is_refused_before_any_work(setting, code, told, project, tmp_path):
    file = tmp_path / "own.py"
    if code is not None:
        file.write_text(code)
    value, wanted = SETTINGS[setting]
    editor = "" if setting == "editing.editor" else f"editing.editor={tiny_editor(tmp_path)}"
    chosen = quick_settings(*filter(None, [editor]), f"{setting}={value.format(file)}")
    with pytest.raises(UserError, match=f"{setting}: {told.format(wanted)}"):
        check_run(project, chosen)


def test_arms_that_the_report_could_not_tell_apart_are_refused():
    for arm in ("a/vanilla.py", "a/cutout.py", "Cut_Out.py"):
        arms = f"training.arms=[vanilla, b/cutout.py, {arm}]"
        with pytest.raises(UserError, match=f"named twice: {Path(arm).stem}"):
            load_settings(Path("/nonexistent"), overrides=[arms], environment={})


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("augmentation = lambda classes: None", "returns NoneType, which is no Augmentation"),
        ("augmentation = lambda: None", "takes 0 positional arguments but"),
    ],
)
def test_an_arm_that_makes_no_augmentation_is_refused_before_any_work(code, told, project, own):
    (own / "wrong.py").write_text(code)
    chosen = quick_settings(
        f"editing.editor={own / 'filters.py'}", f"training.arms=[vanilla, {own / 'wrong.py'}]"
    )
    with pytest.raises(UserError, match=told):
        check_run(project, chosen)


def test_an_editor_that_makes_too_few_edits_is_named(own):
    editor = (own / "filters.py").read_text()
    (own / "filters.py").write_text(editor.replace("pictures, strict=True)])", "pictures)][1:])"))
    edits = ["editing.prompts=[emboss]", "editing.template='{prompt}'"]
    outcome = run(own, f"editing.editor={own / 'filters.py'}", *edits)
    assert outcome.user_error
    assert re.search(r"filters\.py made uint8 \(\d+, .*: an edit has its", outcome.problems[0])


def test_an_arm_that_is_neither_known_nor_a_file_is_refused():
    with pytest.raises(UserError, match=r"use vanilla, .*, or a Python file that defines an aug"):
        load_settings(Path("/nonexistent"), overrides=["training.arms=[vanila]"], environment={})


def test_the_library_is_used_without_dagster(tmp_path):
    """The ten lines of the page."""
    page = (DOCS / "extending.md").read_text("utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "photos" in c)
    assert len(code.splitlines()) <= 10
    write_classes(tmp_path / "photos/train", ["cat", "dog"], 2)
    code += "import sys\nassert not {'dagster', 'mlflow', 'dvc'} & set(sys.modules)\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "augmented").rglob("*.png"))) == 4

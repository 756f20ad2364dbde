"""Promise: the command line says what it did, and a mistake gets one message and exit code 2."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import QUICK, tiny_editor, write_classes
from PIL import Image

from diffusemix_pipeline import terminal
from diffusemix_pipeline.cli import main
from diffusemix_pipeline.datasets.manifest import read_stage
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.layers import load_settings, preset_names
from diffusemix_pipeline.locks import using_edits
from diffusemix_pipeline.project import Project

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder that commands run in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def quick(*more: str) -> list[str]:
    return [
        part
        for setting in [*QUICK, "source.train_per_class=null", *more]
        for part in ("--set", setting)
    ]


def augmented(source: Path, weights: Path, *more: str) -> Result:
    editor = f"editing.editor={weights}"
    return call("augment", "--train-dir", source, "--out", "out", *quick(editor), *more)


def test_augment_gives_an_image_folder_that_others_open(here, weights):
    from datasets import load_dataset
    from torchvision.datasets import ImageFolder

    source = write_classes(here / "photos", ["cat", "dog"], 5)
    result = augmented(source, weights)
    assert result.exit_code == 0, result.output
    assert "10 augmented images in out" in result.output
    folder = ImageFolder("out")
    assert folder.classes == ["cat", "dog"]
    assert len(folder) == 10
    opened = load_dataset("imagefolder", data_dir="out", split="train", cache_dir=str(here / "hf"))
    assert opened.features["label"].names == ["cat", "dog"]
    assert opened.num_rows == 10
    assert "nothing done" in augmented(source, weights).output


def test_augment_gives_files_however_many_and_shards_where_they_are_asked_for(
    here, weights, monkeypatch
):
    monkeypatch.setattr("diffusemix_pipeline.datasets.storage._PACKED_FROM", 5)
    source = write_classes(here / "photos", ["cat", "dog"], 5)
    assert "10 augmented images in out" in augmented(source, weights).output
    assert len(list((here / "out").glob("*/*.png"))) == 10
    packed = ("--set", "storage.format=tar")
    assert "10 augmented images in out" in augmented(source, weights, *packed).output
    assert list((here / "out").glob("*.tar"))
    assert "nothing done" in augmented(source, weights, *packed).output


def test_augment_is_a_superset_of_the_official_command_line(here, weights):
    import pandas as pd

    write_classes(here / "cifar10", ["cat", "dog"], 3)  # a folder here, whatever its name
    write_classes(here / "fractals", ["any"], 2, seed=99)
    official = ["--train_dir", "cifar10", "--fractal_dir", "fractals"]
    official += ["--prompts", "sunset, autumn"]
    editor = f"editing.editor={weights}"
    all_prompts = quick(editor, "editing.prompts_per_image=all")
    result = call("augment", *official, "--out", "out", *all_prompts)
    assert result.exit_code == 0, result.output
    manifest = pd.read_parquet("out/manifest.parquet")
    assert sorted(set(manifest["prompt"])) == ["autumn", "sunset"]
    assert set(manifest["fractal_id"]) <= {"any/0.png", "any/1.png"}
    assert len(manifest) == 2 * 3 * 2


def test_augment_loads_neither_dagster_nor_mlflow_nor_dvc(here, weights):
    import subprocess

    source = write_classes(here / "photos", ["cat", "dog"], 2)
    arguments = ["augment", "--train-dir", str(source), "--out", "out"]
    arguments += quick(f"editing.editor={weights}")
    script = (
        "import sys\nfrom diffusemix_pipeline.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "diffusers" in loaded
    assert not loaded & {"dagster", "mlflow", "dvc"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--preset", "papr"], "no preset 'papr'"),
        (["run", "--set", "editing.stpes=3"], "Did you mean editing.steps"),
        (["run", "--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["run", "--data", "nowhere"], "nowhere does not exist"),
        (["run", "--set", "training.model=resnet10s"], "timm has no model 'resnet10s'"),
        (["run", "--set", "editing.editor=nobody/nothing"], "editing.editor: nobody/nothing"),
        (["settings", "--set", "seed=-1"], "seed = -1"),
        (["augment", "--train-dir", "nowhere", "--out", "out"], "nowhere does not exist"),
        (["augment", "--train-dir", ".", "--out", "out"], "lies inside --train-dir"),
        (["augment", "--train-dir", "../photos", "--out", "out", "--prompts", ""], "prompts.0"),
        (
            ["augment", "--train-dir", "../photos", "--out", "out", "--fractal-dir", "nowhere"],
            "nowhere",
        ),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(arguments, message, here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_classes(here.parent / "photos", ["cat", "dog"], 2)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_augment_refuses_to_write_over_what_is_not_its_own(here, weights):
    source = write_classes(here / "photos", ["cat", "dog"], 2)
    write_classes(here / "out", ["precious"], 1)
    result = augmented(source, weights)
    assert result.exit_code == 2
    assert "not empty and no earlier result" in result.output
    assert (here / "out" / "precious" / "0.png").exists()


def test_augment_names_what_it_sets_aside_and_goes_on_after_a_kill(here, weights):
    source = write_classes(here / "photos", ["cat", "dog"], 2)
    (source / "cat" / "torn.png").write_text("no image")
    for litter in (here / ".out.aside" / "out.0123", here / ".diffusemix" / "augment"):
        litter.mkdir(parents=True)
        (litter / "half.png").write_text("torn")
    result = augmented(source, weights)
    assert result.exit_code == 0
    assert "Set aside: cat/torn.png: UnidentifiedImageError" in result.output
    assert "nothing done" in augmented(source, weights).output
    assert not (here / ".out.aside").exists()


def test_settings_prints_value_origin_and_meaning(here):
    result = call("settings", "--preset", "paper")
    assert result.exit_code == 0
    assert "editing.steps = 100" in result.output
    assert "from preset paper (the library defaults of the authors' code" in result.output
    assert "Sampling steps." in result.output


def test_prompts_reach_the_settings_as_they_were_written(here, weights):
    import pandas as pd

    source = write_classes(here / "photos", ["cat", "dog"], 1)
    result = augmented(source, weights, "--prompts", "it's: [odd]")
    assert result.exit_code == 0, result.output
    assert set(pd.read_parquet("out/manifest.parquet")["prompt"]) == {"it's: [odd]"}


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Give every command of a group, and of its groups, with the words that call it."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


@pytest.mark.parametrize(("path", "command"), commands(main), ids=lambda of: str(of))
def test_every_command_explains_itself(path, command, here):
    result = call(*path, "--help")
    assert result.exit_code == 0
    if not isinstance(command, click.Group):
        assert f"  diffusemix {' '.join(path)}" in result.output.partition("Example")[2]
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert [option.name for option in options if not option.help] == []


def parsed(group: click.Group, words: list[str], parent: click.Context | None = None):
    """Return the context of what `words` ask for, not run; click's UsageError where it fails."""
    name, command, rest = group.resolve_command(click.Context(group, parent), words)
    if isinstance(command, click.Group):
        return parsed(command, rest, click.Context(command, parent))
    return command.make_context(name, rest, parent)


def shell_lines(text: str) -> Iterator[str]:
    """Give each line of a document's shell blocks or of a help's examples that calls us."""
    for line in text.replace("\\\n", " ").splitlines():
        if called := re.match(r"\s*(?:\$ )?(diffusemix .*)", line):
            yield called[1]


def documented() -> Iterator[str]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            yield from shell_lines(block)
    for _, command in commands(main):
        yield from shell_lines((command.help or "").partition("Example")[2])


@pytest.mark.parametrize("line", sorted(set(documented())))
def test_every_command_that_is_shown_is_understood(line, here, monkeypatch):
    """Commands, options and settings exist; files that it names need not."""
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    line = line.replace("=COMMIT", f"={'a' * 40}")
    _, *words = shlex.split(line, comments=True)
    given = parsed(main, words).params
    monkeypatch.undo()
    load_settings(here, preset=given.get("preset"), overrides=given.get("overrides", ()))


def test_the_list_of_commands_is_whole_sentences_and_says_where_to_start(here):
    listed = call("--help").output
    assert "..." not in listed.partition("Commands:")[2]
    assert "Start with: diffusemix run --preset demo" in listed
    for group in ("data", "editor", "store"):
        assert "..." not in call(group, "--help").output.partition("Commands:")[2]


def test_every_preset_is_explained(here):
    told = call("run", "--help").output.replace("\n", " ")
    assert all(re.search(rf"\b{name}\b", told) for name in [*preset_names(), "none"])


def test_settings_can_be_those_of_own_images(here):
    (here / "diffusemix.yaml").write_text("preset: demo")
    photos = write_classes(here / "photos", ["cat", "dog"], 1)
    assert "source.train_per_class = 20" in call("settings").output
    own = call("settings", "--data", "photos").output
    assert f"source.path = '{photos}'" in own
    assert "source.train_per_class = None" in own


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "../cat.png"],
        ["report", "--compare", "a", "b"],
        *(["data", name] for name in ("status", "history", "push", "pull")),
        ["data", "checkout", "1a2b3c"],
        *(["store", name] for name in ("status", "verify", "share", "prune")),
    ],
)
def test_a_command_in_a_folder_without_a_project_leaves_nothing_there(command, here):
    Image.new("RGB", (8, 8)).save(here.parent / "cat.png")
    result = call(*command)
    assert result.exit_code == (
        0 if command[1] in ("status", "prune") and "store" in command else 2
    )
    assert not list(here.iterdir())


def test_an_empty_store_has_nothing_to_prune(here):
    pruned = call("store", "prune", "--yes")
    assert (pruned.exit_code, pruned.output) == (0, "Nothing to prune.\n")


@pytest.mark.parametrize("command", ["run", "preview", "plan"])
def test_a_published_dataset_that_is_mistyped_is_suggested(command, here):
    for name in ("CIFAR10", "cifar-10"):
        result = call(command, "--data", name)
        assert result.exit_code == 2
        assert "Did you mean cifar10? Name a folder of class folders, or one of" in result.output


def test_a_run_that_a_check_ends_after_its_report_says_where_that_is(here, monkeypatch):
    from diffusemix_pipeline.orchestration import launch

    refused = launch.Outcome(
        "id", False, ["the check … failed"], metadata={"robustness_report": {}}
    )
    monkeypatch.setattr(launch, "run_here", lambda *_: refused)
    result = call("run")
    assert result.exit_code == 1
    assert f"Report: {here / 'outputs' / 'report' / 'index.html'}" in result.output


def test_a_trigger_names_what_does_not_answer(here, monkeypatch):
    monkeypatch.delenv("DAGSTER_URL", raising=False)
    assert "DAGSTER_URL" in call("trigger").output
    away = call("trigger", "--url", "http://127.0.0.1:9")
    assert away.exit_code == 2
    assert "No Dagster answers at http://127.0.0.1:9 (connection refused). Start" in away.output


def test_the_store_is_looked_after(here, weights):
    source = write_classes(here / "photos", ["cat", "dog"], 3)
    assert "no" not in call("store", "status").output.split()
    assert augmented(source, weights).exit_code == 0
    assert "6 edits" in call("store", "status").output
    assert "dtype " in call("store", "status").output
    assert "6 of 6 edits are as they were stored" in call("store", "verify").output

    first = next((here / ".diffusemix" / "edits").glob("??/*.png"))
    first.unlink()
    first.write_bytes(b"torn")
    damaged = call("store", "verify")
    assert damaged.exit_code == 1
    assert first.stem in damaged.output
    assert "1 damaged" in call("store", "status").output

    more = augmented(source, weights, "--prompts", "snowy")
    assert more.exit_code == 0
    young = call("store", "prune", "--yes").output
    assert "0 edits removed, 12 kept" in young
    assert "6 more are not used, but are of the last day" in young
    for edit in (here / ".diffusemix" / "edits").glob("??/*.png"):
        os.utime(edit, (0, 0))
    unused = call("store", "prune").output
    assert unused.startswith("6 edits are not used")  # the damaged one was in the dataset, too
    stored = (edit.stem for edit in (here / ".diffusemix" / "edits").glob("??/*.png"))
    [stage] = Path(".diffusemix/augment").glob("*/generated")
    used = set(read_stage(stage).manifest(["edit_key"])["edit_key"])
    dropped = next(key for key in stored if key not in used)
    Path("dropped.txt").write_text(f"edit {dropped}\n")
    assert "5 edits removed, 7 kept" in call("store", "prune", "--yes").output
    assert "7 edits" in call("store", "status").output
    with using_edits(Project(here)):  # as a run does
        assert "Edits are being made or used" in call("store", "prune", "--yes").output
        assert "Edits are being made or used" in call("store", "verify").output
    assert "nothing done" in augmented(source, weights, "--prompts", "snowy").output


def test_without_a_dataset_no_edit_is_called_unused(here):
    store = EditStore(here / ".diffusemix" / "edits")
    store.put("ab" * 16, np.zeros((8, 8, 3), np.uint8), "p")
    refused = call("store", "prune", "--yes")
    assert refused.exit_code == 2
    assert "none of the 1 edits is used" in refused.output
    assert len(list(store)) == 1


def test_a_preview_shows_every_prompt_and_its_edits_are_the_run_s(here, weights):
    source = write_classes(here / "photos", ["cat", "dog"], 3)
    (source / "cat" / "0.png").write_bytes(b"no image")
    chosen = ("--prompts", "night, fog", "--images", "3")
    editor = quick(f"editing.editor={weights}")
    result = call("preview", "--data", source, *chosen, *editor)
    assert result.exit_code == 0, result.output
    sheet = Image.open("preview.png")
    assert sheet.width > 3 * 128 and sheet.height > 3 * 128
    assert "6 edits" in call("store", "status").output
    every = augmented(
        source, weights, "--prompts", "night, fog", "--set", "editing.prompts_per_image=all"
    )
    assert every.exit_code == 0
    assert "10 edits" in call("store", "status").output  # of 5 images, 3 of which were previewed


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit_a_narrow_terminal_with_names_whole(width, monkeypatch, capsys):
    monkeypatch.setattr(terminal.console, "width", width)
    cells = ["91.7 (87.3 to 94.3)"] * 4
    rows = [[arm, *cells] for arm in ("vanilla", "trivialaugment", "diffusemix_online")]
    terminal.print_table(["Arm", "Clean", "Corrupted", "Corrupted, unshared", "FGSM"], rows)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert "diffusemix_online" in shown

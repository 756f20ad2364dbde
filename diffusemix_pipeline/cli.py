"""A person's door: `diffusemix …`.

Each command reads settings, calls one function and says what came of it.
"""

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from diffusemix_pipeline.errors import UserError, of_the_machine
from diffusemix_pipeline.layers import (
    SETTINGS_FILE,
    Layer,
    describe,
    load_layers,
    load_settings,
    merge,
    nested_overrides,
)
from diffusemix_pipeline.locks import alone_with_edits, holders, using_edits
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

if TYPE_CHECKING:
    from diffusemix_pipeline.orchestration.launch import Outcome

_LOOPBACK = "127.0.0.1"
_REPORT_ASSET = "robustness_report"
_PATH = click.Path(path_type=Path)
_THINNED = "{} training images are left out by source.train_per_class"


class _NamedFolder(click.ParamType):
    """NAME=FOLDER."""

    name = "NAME=FOLDER"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Path]:
        """Split at the first equals sign."""
        name, equals, folder = str(value).partition("=")
        if not equals or not Path(folder).is_dir():
            self.fail(f"{value}: write NAME=FOLDER, and the folder must exist.", param, ctx)
        return name, Path(folder)


_NAMED_FOLDER = _NamedFolder()


class _Command(click.Group):
    """A group whose UserErrors, and what the machine fails with, are one message and code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            told = str(error)
        except Exception as error:
            told = of_the_machine(f"{type(error).__name__}: {error}") or ""
            if not told:
                raise
        _tell(told)
        ctx.exit(2)


def _tell(problem: str) -> None:
    """Print a problem; of a database that is locked, with who has it open."""
    if "database is locked" in problem:
        pids = holders(*Project(Path.cwd()).state.rglob("*.db"))
        problem += f" It is open in: {', '.join(map(str, pids)) or 'no process of this machine'}."
    click.echo(f"diffusemix: {problem}", err=True)


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="One setting, e.g. editing.steps=20; may be repeated. `diffusemix settings` "
            "lists them.",
        ),
        click.option("--config", type=_PATH, help="A YAML file of settings, over the preset's."),
        click.option(
            "--preset",
            help="A set of settings. demo: the digits, in minutes. paper, official: as the paper "
            "and the authors' code have it. balanced, turbo: the same in a fifteenth and a "
            "thirty-third of the UNet evaluations. general, fine_grained, fine_tuning, "
            "data_scarcity, adversarial: the paper's five tasks. none: no preset. All but demo and "
            "none fetch a checkpoint from the Hugging Face hub and want a GPU.",
        ),
    ):
        command = option(command)
    return command


_data_option = click.option(
    "--data",
    metavar="FOLDER|NAME",
    help="A folder of labelled images, a published dataset (cifar100, cub200, …) or a Python file "
    "that lists images (source.path).",
)


def _settings_for(
    data: str | None, preset: str | None, config: Path | None, overrides: Sequence[str]
) -> Settings:
    """Read the settings, `--data` among them; say the terms of a published dataset."""
    from diffusemix_pipeline.datasets.published import PUBLISHED, terms

    settings = merge(_layers_for(data, preset, config, overrides))
    if settings.source.path in PUBLISHED:
        click.echo(terms(settings.source.path))
    return settings


def _layers_for(
    data: str | None, preset: str | None, config: Path | None, overrides: Sequence[str]
) -> list[Layer]:
    """Read the layers of the settings, the highest of them with what `--data` names."""
    given = list(overrides)
    if data:
        from diffusemix_pipeline.datasets.sources import NAMES

        source = data if data in NAMES else Path(data).resolve()
        given.append(f"source.path={_quoted(source)}")
    return load_layers(
        Path.cwd(), preset=preset, own_images=bool(data), config=config, overrides=given
    )


def _project_here() -> Project:
    """Return the project that a command looks at; UserError where there is none.

    Otherwise a command in the wrong folder would leave an empty database or repository there.
    """
    project = Project(Path.cwd())
    marks = (project.state, project.root / SETTINGS_FILE, project.root / "data.dvc")
    if not any(mark.exists() for mark in marks):
        raise UserError(
            f"{project.root} holds no project. Change to the project's folder, or start one here "
            "with `diffusemix run`."
        )
    return project


@click.group(
    cls=_Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: diffusemix run --preset demo",
)
@click.version_option(package_name="diffusemix-pipeline")
def main() -> None:
    """DiffuseMix: edit, mix, train and judge, with every image traceable to its source."""
    warnings.simplefilter("ignore")  # of libraries
    warnings.filterwarnings("always", category=UserWarning, module=r"diffusemix_pipeline\.")
    warnings.showwarning = _show_warning


@main.command()
@_settings_options
@_data_option
def run(
    preset: str | None, config: Path | None, overrides: Sequence[str], data: str | None
) -> None:
    """Run the whole pipeline, from images to the report.

    \b
    Examples:
      diffusemix run --preset demo
      diffusemix run --data photos
      diffusemix run --data cifar100 --set size=32
    """
    from diffusemix_pipeline.orchestration.launch import run_here
    from diffusemix_pipeline.terminal import progress_bars

    settings = _settings_for(data, preset, config, overrides)
    project = Project(Path.cwd())
    with progress_bars() as progress:
        outcome = run_here(project, settings, progress)
    if not outcome.success:
        for problem in outcome.problems:
            _tell(problem)
        if _REPORT_ASSET in outcome.metadata:  # a check refused what it says
            click.echo(f"Report: {project.report / 'index.html'}", err=True)
        raise SystemExit(2 if outcome.user_error else 1)
    _print_outcome(project, outcome)


@main.command()
@_settings_options
@click.option("--train-dir", "--train_dir", type=_PATH, required=True, help="Class folders.")
@click.option("--out", type=_PATH, required=True, help="Where the ImageFolder is written.")
@click.option("--prompts", help='Comma-separated, e.g. "sunset, autumn" (editing.prompts).')
@click.option("--fractal-dir", "--fractal_dir", type=_PATH, help="Fractals (mixing.fractal_dir).")
def augment(
    preset: str | None,
    config: Path | None,
    overrides: Sequence[str],
    train_dir: Path,
    out: Path,
    prompts: str | None,
    fractal_dir: Path | None,
) -> None:
    """Augment a folder of class folders, and nothing else.

    \b
    Example:
      diffusemix augment --train-dir photos/train --out augmented \\
        --prompts "sunset, autumn"
    """
    from diffusemix_pipeline.augmentation import augment_folder
    from diffusemix_pipeline.terminal import progress_bars

    given = [*overrides, *_prompt_override(prompts)]
    if fractal_dir is not None:
        given.append(f"mixing.fractal_dir={_quoted(fractal_dir)}")
    settings = load_settings(
        Path.cwd(), preset=preset, own_images=True, config=config, overrides=given
    )
    with progress_bars() as progress:
        made = augment_folder(train_dir, out, settings, Project(Path.cwd()), progress)
    for item in made.set_aside:
        click.echo(f"Set aside: {item['source_id']}: {item['reason']}", err=True)
    if made.left_out_by_train_per_class:
        click.echo(_THINNED.format(made.left_out_by_train_per_class), err=True)
    if made.rejected:
        click.echo(f"The label gate rejected {made.rejected} edits.", err=True)
    done = "Nothing changed, nothing done" if made.stage.reused else "Done"
    click.echo(f"{done}: {made.stage.counts['images']} augmented images in {out}.")


@main.command()
@_settings_options
@_data_option
@click.option("--prompts", help='Comma-separated, e.g. "sunset, autumn" (editing.prompts).')
@click.option(
    "--images",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="How many images to draw, a row each.",
)
@click.option(
    "--out",
    type=_PATH,
    default=Path("preview.png"),
    show_default=True,
    help="The picture to write, as PNG.",
)
def preview(
    preset: str | None,
    config: Path | None,
    overrides: Sequence[str],
    data: str | None,
    prompts: str | None,
    images: int,
    out: Path,
) -> None:
    """Draw a few images under each prompt, to choose prompts.

    Its edits stay in the store, where a run finds them.

    \b
    Example:
      diffusemix preview --data photos --prompts "sunset, autumn, snowy"
    """
    from diffusemix_pipeline.datasets.manifest import STAGE
    from diffusemix_pipeline.datasets.sources import DIGITS
    from diffusemix_pipeline.files import write_bytes
    from diffusemix_pipeline.preview import preview as draw
    from diffusemix_pipeline.terminal import progress_bars

    settings = _settings_for(data, preset, config, [*overrides, *_prompt_override(prompts)])
    project = Project(Path.cwd())
    at_hand = str(project.raw) if (project.raw / STAGE).exists() else DIGITS
    source = settings.source.path or at_hand
    with progress_bars() as progress:
        png = draw(source, settings, project, images, progress)
    write_bytes(out, png)
    click.echo(f"Preview: {out}")


class _Duration(click.ParamType):
    """Seconds, from '90m', '2h' or '45s'."""

    name = "duration"

    def convert(self, value: Any, param: Any, context: Any) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", str(value).strip())
        if not found or not float(found[1]):
            self.fail(f"'{value}' is no duration: write it as 45s, 90m, 2h or 1.5d.")
        return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


@main.command()
@_settings_options
@_data_option
@click.option(
    "--budget",
    type=_Duration(),
    help="The time to spend, e.g. 90m or 2h: says which share of the images can be edited in it.",
)
def plan(
    preset: str | None,
    config: Path | None,
    overrides: Sequence[str],
    data: str | None,
    budget: float | None,
) -> None:
    """Say what a run's edits will cost in time and disk.

    It makes and times a few of the edits. They stay in the store, so the run that follows does not
    make them again. Nothing is trained, but for the label gate's classifiers where that is on.

    \b
    Example:
      diffusemix plan --data photos --preset balanced --budget 2h
    """
    from diffusemix_pipeline.cost_plan import plan_cost
    from diffusemix_pipeline.terminal import print_table, progress_bars

    settings = _settings_for(data, preset, config, overrides)
    with progress_bars() as progress:
        planned = plan_cost(settings, Project(Path.cwd()), budget, progress)
    rows = [
        ["images", planned.origin],
        ["edits wanted", f"{planned.edits:,}"],
        ["in the store", f"{planned.stored:,}"],
    ]
    if left := planned.forecast:
        cost = left.cost
        rows += [
            ["made for this plan", f"{cost.pilot:,}"],
            ["still to be made", f"{left.edits:,}"],
            ["edits a second", f"{cost.round_edits / cost.round_seconds:.2f}"],
            ["time", _duration(left.seconds)],
        ]
        if cost.accepted is not None:
            rows.append(["accepted by the gate", f"{cost.accepted:.0%}"])
        rows += [
            ["edited images in the end", f"{left.images:,}"],
            ["disk, with what is mixed of them", f"{left.disk_megabytes:,.1f} MB"],
        ]
    print_table(["what", "how much"], rows, "Cost of the edits, on this device alone")
    if not planned.forecast:
        click.echo("A pilot, two rounds of batches, would make all that are missing: just run.")
    elif budget and planned.share == 1:
        click.echo(f"All of it fits into {_duration(budget)}.")
    elif budget and planned.share:
        click.echo(
            f"Within {_duration(budget)}: --set editing.share={planned.share:g}, the same share of "
            "every class. A larger share later keeps these edits."
        )
    elif budget:
        click.echo(f"Not even a hundredth of the images fits into {_duration(budget)}.")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


@main.command()
@click.argument("image_ids", metavar="IMAGE_ID...", nargs=-1, required=True)
def drop(image_ids: Sequence[str]) -> None:
    """Take images or single edits out of the dataset.

    An image of data/raw goes with all that was made of it; its name in the source folder will do.
    The next run makes a new version of the dataset, without a new edit.

    \b
    Examples:
      diffusemix drop train/cat/0421.jpg
      diffusemix drop cat/0007-5f6a7b8c9d0e1f2a.sunset.0.9d0e1f2a
    """
    from diffusemix_pipeline.datasets.dropped import drop as add

    project = Project(Path.cwd())
    for line in (added := add(project.dropped, image_ids, project.stages)):
        kind, _, image_id = line.split(" ", 2)
        click.echo(f"Dropped the {kind} {image_id}")
    where = f"{project.dropped.name}: commit it; without its line, an image comes back"
    click.echo(f"Written to {where}." if added else f"All of them are in {project.dropped.name}.")


@main.command()
@click.option(
    "--compare",
    nargs=2,
    metavar="RUN_A RUN_B",
    help="Two reports: each a folder, a report.json, or the id of an MLflow run or its first "
    "seven letters.",
)
def report(compare: tuple[str, str] | None) -> None:
    """Print the last report, or compare two.

    It is Markdown. The next run replaces outputs/report: copy it first to compare it later, or name
    the MLflow runs, which keep theirs.

    \b
    Examples:
      diffusemix report
      diffusemix report --compare before/report outputs/report
    """
    import tempfile

    from diffusemix_pipeline.evaluation.changes import changes, read_document
    from diffusemix_pipeline.evaluation.written_report import MARKDOWN, read_report
    from diffusemix_pipeline.tracking import open_tracking

    project = Project(Path.cwd())
    if not compare:
        click.echo((read_report(project.report).folder / MARKDOWN).read_text(encoding="utf-8"))
        return
    with tempfile.TemporaryDirectory() as aside:
        places = [Path(name) for name in compare]
        for number, place in enumerate(places):
            if not place.exists():  # then it is a run's id
                tracker = open_tracking(_project_here(), load_settings(Path.cwd()).tracking)
                (Path(aside) / str(number)).mkdir()
                places[number] = tracker.report(str(place), Path(aside) / str(number))
        click.echo(changes(*(read_document(place) for place in places)), nl=False)


_host_option = click.option(
    "--host", default=_LOOPBACK, show_default=True, help="The address to listen on."
)


def _warn_of_others(host: str) -> None:
    """Say who reaches a server that listens on `host`, where that is not this machine alone."""
    if not _is_loopback(host):
        click.echo(
            f"WARNING: {host} may be reached from other machines, and the server asks nobody who "
            "they are: whoever reaches it can launch runs with any settings, or change runs and "
            "models. Leave --host out, or put a proxy that asks before it (docs/security.md).",
            err=True,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@main.command()
@_host_option
@click.option("--port", default=3000, show_default=True, help="The port to listen on.")
def ui(host: str, port: int) -> None:
    """Serve Dagster's web UI, with its daemon for schedules.

    It runs until you press Ctrl-C.

    \b
    Example:
      diffusemix ui --port 3000
    """
    from diffusemix_pipeline.orchestration.launch import prepare_instance

    prepare_instance(Project(Path.cwd()))
    # A sensor reads all that is new in the source, which may take longer than Dagster's minute.
    os.environ.setdefault("DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS", "3600")
    _warn_of_others(host)
    click.echo(f"Dagster: http://{host}:{port}")
    command = ["-m", "dagster", "dev", "-h", host, "-p", str(port), "-w", "workspace.yaml"]
    _become([sys.executable, *command])


@main.command()
@_host_option
@click.option("--port", default=5000, show_default=True, help="The port to listen on.")
def mlflow(host: str, port: int) -> None:
    """Serve MLflow's web UI: runs, curves and models.

    It runs until you press Ctrl-C.

    \b
    Example:
      diffusemix mlflow --port 5000
    """
    from diffusemix_pipeline.tracking import mlflow_ui_command

    command = mlflow_ui_command(Project(Path.cwd()), load_settings(Path.cwd()).tracking, port, host)
    _warn_of_others(host)
    click.echo(f"MLflow: http://{host}:{port}")
    _become(command)


@main.command()
@_settings_options
@_data_option
def settings(
    preset: str | None, config: Path | None, overrides: Sequence[str], data: str | None
) -> None:
    """Print every setting: value, origin and meaning.

    With the options of a run, it prints the settings of that run.

    \b
    Examples:
      diffusemix settings
      diffusemix settings --data photos --preset paper
    """
    for setting in describe(_layers_for(data, preset, config, overrides)):
        click.echo(f"{click.style(setting.key, bold=True)} = {setting.value!r}")
        click.echo(f"    from {setting.origin}. {setting.description}")


@main.group()
def editor() -> None:
    """List, train and evaluate editors."""


@editor.command("list")
def list_editors() -> None:
    """List the kinds of editors, and settings that suit them.

    \b
    Example:
      diffusemix editor list
    """
    from tabulate import tabulate

    from diffusemix_pipeline.editing.editor import FAMILIES

    rows = [("bundled", "Apache-2.0", "the defaults", "batch_size")]
    for family in FAMILIES:
        settings = "\n".join(f"{k}={v}" for k, v in family.advice.items() if k != "lora")
        at_once = "batch_size" if family.batches else "1"
        name = f"{family.example}\n({family.pipeline})"
        rows.append((name, family.licence, settings, at_once))
    headers = ("editing.editor", "licence of the weights", "under editing", "edits at once")
    click.echo(tabulate(rows, headers, tablefmt="grid", maxcolwidths=[None, 24, None, None]))
    for family in FAMILIES:
        if "lora" in family.advice:  # too long for a column
            click.echo(f"{family.example} with editing.lora={family.advice['lora']}")
    click.echo(
        "A checkpoint of your own, of one of these classes, goes the same way; anything else"
    )
    click.echo("that turns images into images is a Python file: docs/extending.md.")


@editor.command()
@click.option("--out", type=_PATH, required=True, help="Where the pipeline folder is written.")
@click.option("--images", type=_PATH, multiple=True, help="A folder of images to train on too.")
@click.option("--seed", default=0, show_default=True, help="What every random draw follows from.")
def train(out: Path, images: Sequence[Path], seed: int) -> None:
    """Train an editor like the bundled one from nothing.

    It takes hours; the same command goes on with a training that was cut off.

    \b
    Example:
      diffusemix editor train --out my-editor --images photos
    """
    from diffusemix_pipeline.bundled_editor.training import train_editor
    from diffusemix_pipeline.terminal import progress_bars

    checkpoints = Project(Path.cwd()).state / "editor-training"
    with progress_bars() as progress:
        folder = train_editor(
            out, image_folders=images, seed=seed, checkpoint_dir=checkpoints, progress=progress
        )
    click.echo(f"The editor is in {folder}: use it with --set editing.editor={folder}")


@editor.command()
@click.option(
    "--editor",
    "location",
    default="bundled",
    show_default=True,
    help="What to evaluate: bundled, a folder, a hub id or a Python file (editing.editor).",
)
@click.option("--revision", help="The commit of a hub id (editing.revision).")
@click.option(
    "--train",
    type=_NAMED_FOLDER,
    multiple=True,
    help="Class folders on which the classifiers that judge its edits are trained; the name is for "
    "the table. May be repeated.",
)
@click.option(
    "--test",
    type=_NAMED_FOLDER,
    multiple=True,
    help="Class folders whose images it edits, under the same name as in --train.",
)
@click.option(
    "--sheet",
    type=_PATH,
    default=Path("editor.png"),
    show_default=True,
    help="The picture of images and edits to write, as PNG.",
)
def evaluate(
    location: str,
    revision: str | None,
    train: Sequence[tuple[str, Path]],
    test: Sequence[tuple[str, Path]],
    sheet: Path,
) -> None:
    """Print an editor's figures, and draw a sheet of its edits.

    It is measured on the digits and on the image folders that are named.

    \b
    Example:
      diffusemix editor evaluate --train cifar10=cifar10/train \\
        --test cifar10=cifar10/test
    """
    from diffusemix_pipeline.bundled_editor.evaluation import evaluate_editor
    from diffusemix_pipeline.editing.editor import locate_editor
    from diffusemix_pipeline.terminal import progress_bars

    if dict(train).keys() != dict(test).keys():
        raise UserError("--train and --test must name the same sets, e.g. cifar10=FOLDER in both.")
    with progress_bars() as progress:
        figures = evaluate_editor(
            locate_editor(location, revision),
            image_folders=dict(test),
            train_folders=dict(train),
            sheet=sheet,
            progress=progress,
        )
    click.echo(json.dumps(figures, indent=2))
    click.echo(f"Contact sheet: {sheet}", err=True)


def _prompt_override(prompts: str | None) -> list[str]:
    """Turn a comma-separated list into the setting that it stands for."""
    if prompts is None:
        return []
    return [f"editing.prompts=[{', '.join(map(_quoted, prompts.split(',')))}]"]


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    click.echo(f"diffusemix: {message}", err=True)


@main.group()
def data() -> None:
    """See, share and bring back the versions of data/."""


@data.command("status")
def data_status() -> None:
    """Say which version is pinned, and whether data/ is that.

    \b
    Example:
      diffusemix data status
    """
    from diffusemix_pipeline.versioning import changes, committed_digest

    root = Path.cwd()
    pinned = _pinned(root)
    click.echo(f"data.dvc pins {pinned}")
    committed = committed_digest(root)
    if committed:
        same = "the same" if committed == pinned else f"{committed}: commit data.dvc to keep this"
        click.echo(f"git's HEAD pins {same}")
    changed = changes(root)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(changed.items()))
    click.echo(f"data/ is {'as pinned' if not changed else f'not as pinned: {counts}'}")


def _pinned(root: Path) -> str:
    """Return the version that data.dvc pins; UserError without one."""
    from diffusemix_pipeline.versioning import pinned_digest

    pinned = pinned_digest(root)
    if pinned is None:
        raise UserError(
            f"{root / 'data.dvc'} is not there, or pins nothing: `diffusemix run` makes it. In a "
            "clone, `git checkout data.dvc` brings it back; else change to the project's folder."
        )
    return pinned


@data.command("push")
def data_push() -> None:
    """Send the pinned version to the DVC remote.

    \b
    Example:
      diffusemix data push
    """
    from diffusemix_pipeline.versioning import push

    _project_here()
    click.echo(f"Pushed to the DVC remote '{push(Path.cwd())}'.")


@data.command("pull")
def data_pull() -> None:
    """Make data/ what data.dvc pins.

    It is taken from DVC's cache here, or from the DVC remote.

    \b
    Example:
      diffusemix data pull
    """
    from diffusemix_pipeline.orchestration.holding import without_runs
    from diffusemix_pipeline.versioning import pull

    project = Project(Path.cwd())
    pinned = _pinned(project.root)
    with without_runs(project):
        pulled = pull(project.root, afresh=True)
    if not pulled:
        raise UserError(
            f"Neither the DVC cache here nor a remote holds {pinned}, which data.dvc pins: run "
            "`diffusemix data push` where it was made, or add its remote here with "
            "`dvc remote add -d NAME URL`."
        )
    click.echo(f"data/ is {pinned}")


@data.command("history")
def data_history() -> None:
    """List the versions, their commits and their models.

    \b
    Example:
      diffusemix data history
    """
    from diffusemix_pipeline.orchestration.data_versions import history
    from diffusemix_pipeline.terminal import print_table
    from diffusemix_pipeline.tracking import SHORT_ID
    from diffusemix_pipeline.versioning import pinned_digest

    project = _project_here()
    here = pinned_digest(project.root)
    rows = []
    for version in history(project, load_settings(project.root)):
        mark = "*" if version.digest == here else ""
        cells = [version.digest[:8] + mark, " ".join(version.commits)]
        if not version.trainings:
            rows.append([*cells, "", "", "", "", ""])
        for training in version.trainings:
            accuracy = training.metrics.get("test_clean")
            cells += [
                f"{training.started:%Y-%m-%d %H:%M}",
                training.name.replace(",", ""),
                training.model_version or "",
                "" if accuracy is None else f"{100 * accuracy:.1f}",
                training.run_id[:SHORT_ID],
            ]
            rows.append(cells)
            cells = ["", ""]
    columns = ["data", "commits", "trained", "arm", "model", "test", "run"]
    print_table(
        columns, rows, "Versions of data/: * is pinned now; times in UTC, accuracy on test in %"
    )


@data.command("checkout")
@click.argument("version")
def data_checkout(version: str) -> None:
    """Bring a version of data/ back.

    VERSION is the start of its digest, as `diffusemix data history` lists it, or a commit that pins
    it.

    \b
    Example:
      diffusemix data checkout 1a2b3c
    """
    from diffusemix_pipeline.orchestration.data_versions import checkout
    from diffusemix_pipeline.orchestration.holding import without_runs

    project = _project_here()
    with without_runs(project):
        digest, kept = checkout(project, load_settings(project.root), version)
    click.echo(f"data/ is {digest}")
    if kept:
        click.echo(f"Its models are made again by: diffusemix run --config {kept.settings}")
        if kept.dropped:
            click.echo(f"Other images or edits were dropped then: put {kept.dropped} in its place.")


@main.group()
def store() -> None:
    """Look after the edit store, which keeps every edit."""


@store.command()
def status() -> None:
    """Count the edits, their bytes and what made them.

    \b
    Example:
      diffusemix store status
    """
    from diffusemix_pipeline.editing.store import EditStore

    project = Project(Path.cwd())
    edits = EditStore(project.edits)
    found = edits.status()
    click.echo(f"{found.edits:,} edits, {found.bytes / 1e6:,.1f} MB in {project.edits}")
    for profile, number in sorted(found.by_profile.items()):
        made_by = ", ".join(f"{k} {v}" for k, v in found.profiles[profile].items())
        click.echo(f"{number:,} made by: {made_by}")
    if found.quarantined:
        click.echo(f"{found.quarantined:,} damaged files in {edits.quarantine}")


@store.command()
def verify() -> None:
    """Read every edit, and set damaged ones aside.

    They are made anew when they are next wanted. The exit code is 1 where there was any.

    \b
    Example:
      diffusemix store verify
    """
    from diffusemix_pipeline.editing.store import EditStore
    from diffusemix_pipeline.terminal import progress_bars

    project = _project_here()
    edits = EditStore(project.edits)
    with alone_with_edits(project), progress_bars() as progress:
        keys = list(edits)
        sound = edits.checked(keys, progress)
    damaged = [key for key in keys if key not in sound]
    click.echo(f"{len(sound):,} of {len(keys):,} edits are as they were stored.")
    for key in damaged:
        click.echo(f"Set aside: {key}", err=True)
    raise SystemExit(1 if damaged else 0)


@store.command()
def share() -> None:
    """Copy every edit to the bucket that storage.edits names.

    Other machines then need not make them. A run shares and brings the edits that it wants by
    itself.

    \b
    Example:
      diffusemix store share
    """
    from diffusemix_pipeline.editing.shared_edits import SharedEdits
    from diffusemix_pipeline.editing.store import EditStore
    from diffusemix_pipeline.terminal import progress_bars

    project, url = _project_here(), load_settings(Path.cwd()).storage.edits
    if not url:
        raise UserError("storage.edits names no place: set it to a URL such as s3://bucket/edits.")
    SharedEdits(url).check()
    edits = EditStore(project.edits, url)
    with using_edits(project), progress_bars() as progress:
        keys = list(edits)
        edits.exchange(keys, progress)
    click.echo(f"What {project.edits} holds, {len(keys):,} edits, is in {url}; damaged ones stay.")


@store.command()
@click.option("--yes", is_flag=True, help="Remove them; without it they are only counted.")
def prune(yes: bool) -> None:
    """Remove edits that no dataset of this project uses.

    What was dropped stays. Edits of a preview, a plan or a run that was cut off are not used yet:
    they go as well, but for those of the last day, which may be of a run that is still going on.

    \b
    Examples:
      diffusemix store prune
      diffusemix store prune --yes
    """
    from diffusemix_pipeline.editing.store import EditStore
    from diffusemix_pipeline.orchestration.maintenance import unused_edits

    project = Project(Path.cwd())
    if not any(EditStore(project.edits)):
        click.echo("Nothing to prune.")
        return
    found = unused_edits(project, remove=yes)
    old = len(found.old)
    if yes:
        click.echo(f"{old:,} edits removed, {found.every - old:,} kept.")
    else:
        click.echo(f"{old:,} edits are not used; `diffusemix store prune --yes` removes them.")
    if young := len(found.young):
        click.echo(f"{young:,} more are not used, but are of the last day, and stay.")


@main.command()
@click.argument("images", nargs=-1, required=True, type=_PATH)
@click.option(
    "--alias",
    default="champion",
    show_default=True,
    help="Which registered model to ask: champion, challenger or an arm's name, e.g. vanilla.",
)
def predict(images: Sequence[Path], alias: str) -> None:
    """Name what images show, with the best model so far.

    That is the champion in MLflow's registry. A folder stands for its images. Each line of the
    answer is file, class and probability.

    \b
    Examples:
      diffusemix predict cat.jpg
      diffusemix predict photos --alias challenger
    """
    from diffusemix_pipeline.datasets.images import UnreadableImageError
    from diffusemix_pipeline.datasets.items import visible_files
    from diffusemix_pipeline.tracking import open_tracking

    asked = [f for path in images for f in (visible_files(path) if path.is_dir() else [path])]
    if not asked:
        raise UserError(f"No files are in {', '.join(map(str, images))}.")
    tracking = load_settings(Path.cwd()).tracking
    project = Project(Path.cwd()) if tracking.uri else _project_here()
    model = open_tracking(project, tracking).load(alias)
    failed = 0
    for path in asked:
        try:
            [answer] = model.predict([path]).to_dict("records")
        except UnreadableImageError as error:
            failed += 1
            click.echo(f"{path}: {error}", err=True)
            continue
        label = answer["label"]
        click.echo(f"{path}\t{label}\t{answer[f'p({label})']:.3f}")
    raise SystemExit(1 if failed else 0)


@main.command()
@click.option(
    "--url",
    envvar="DAGSTER_URL",
    show_envvar=True,
    required=True,
    help="Dagster's address, e.g. http://127.0.0.1:3000.",
)
@click.option(
    "--job",
    default="diffusemix",
    show_default=True,
    help="The job to launch: diffusemix is the whole pipeline, maintenance the housekeeping.",
)
@click.option(
    "--tag",
    "tags",
    metavar="KEY=VALUE",
    multiple=True,
    help="A tag to give the run in Dagster, e.g. git_sha=1a2b3c; may be repeated.",
)
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="A setting for this run, over the server's own, e.g. seed=1; may be repeated.",
)
@click.option("--wait", is_flag=True, help="Follow the run; the exit code is how it ended.")
@click.option("--report", type=_PATH, help="Where to write the run's report as Markdown.")
def trigger(
    url: str,
    job: str,
    tags: Sequence[str],
    overrides: Sequence[str],
    wait: bool,
    report: Path | None,
) -> None:
    """Launch a run on a Dagster that is up elsewhere.

    It runs there with the server's settings, but for those of --set. With --wait, the exit code is
    0 where the run succeeded and its model is the champion, 1 where the run failed or was
    cancelled, and 3 where the promotion was refused. A token for a proxy before the server is read
    from DAGSTER_TOKEN.

    \b
    Example:
      diffusemix trigger --url http://127.0.0.1:3000 --set seed=1 --wait
    """
    from diffusemix_pipeline.orchestration.trigger import launch

    if report and not wait:
        raise click.UsageError("--report needs --wait.")
    tagged = dict(_named(tag, "--tag") for tag in tags)
    token = os.environ.get("DAGSTER_TOKEN")
    run = launch(url, job, tagged, nested_overrides(overrides), token)
    click.echo(f"Launched: {run.address}")
    if not wait:
        return
    ending = run.follow(click.echo)
    if report and ending.report:
        report.write_text(ending.report, encoding="utf-8")
    click.echo(f"{ending.status.value}: {run.address}")
    if not ending.succeeded:
        raise SystemExit(1)
    if ending.refused:
        click.echo(f"Not promoted. {ending.refused}", err=True)
        raise SystemExit(3)


def _named(text: str, option: str) -> tuple[str, str]:
    """Split KEY=VALUE at its first equals sign."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {text}: write it as KEY=VALUE.")
    return key, value


def _become(command: list[str]) -> NoReturn:
    """Turn into a server, so that whoever ends this process ends the server."""
    sys.stdout.flush()
    os.execv(command[0], command)


def _print_outcome(project: Project, outcome: "Outcome") -> None:
    """Print the report's table and where everything is."""
    from diffusemix_pipeline.evaluation.written_report import read_report
    from diffusemix_pipeline.terminal import console, print_table

    report = read_report(project.report)
    accuracies = {name: title for name, title in report.titles.items() if name != "ece"}
    rows = [
        [arm, *(_with_interval(row, name) for name in accuracies)]
        for arm, row in report.summary.to_dict("index").items()
    ]
    if outcome.reused:
        console.print("Nothing changed, nothing done: every stage was there already.")
    for line in _what_to_know(outcome):
        console.print(line, markup=False)
    print_table(["Arm", *accuracies.values()], rows, "Accuracy on test in %, 95 % interval")
    console.print(report.headline, markup=False)
    console.print(f"Report: {report.html}", markup=False)


def _what_to_know(outcome: "Outcome") -> Iterator[str]:
    """Say what a person would find out late: what was left out, what was not pushed."""
    raw = outcome.metadata["raw_dataset"]
    yield f"Images: {raw['images'].value} from {raw['origin'].value}"
    if thinned := raw["left_out_by_train_per_class"].value:
        yield _THINNED.format(thinned)
    edits = outcome.metadata["generated_images"]
    if "predicted_seconds" in edits:
        predicted = _editing_took(
            edits, "predicted_seconds", "predicted_images", "predicted_megabytes"
        )
        actual = _editing_took(edits, "actual_seconds", "images", "megabytes")
        yield f"Editing: {actual}; a pilot predicted {predicted}"
    if set_aside := raw["set_aside"].value:
        first = raw["first_set_aside"].value
        files = "1 file is" if set_aside == 1 else f"{set_aside} files are"
        yield f"{files} set aside, named in data/raw/stage.json; first: {first}"
    yield f"DVC: {outcome.metadata['fractal_augmented_dataset']['dvc_push'].value}"
    champion = outcome.metadata["champion"]
    yield f"Champion: {champion['champion'].value}; challenger: {champion['challenger'].value}"
    yield str(champion["reason"].value)


def _editing_took(edits: Mapping[str, Any], seconds: str, images: str, megabytes: str) -> str:
    time, count, size = (edits[name].value for name in (seconds, images, megabytes))
    return f"{_duration(time)}, {count:,} images, {size:,.1f} MB"


def _with_interval(row: Mapping[Any, float], measure: str) -> str:
    value, low, high = (100 * row[f"{measure}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _quoted(text: Any) -> str:
    """Write text as a YAML string, whatever it holds."""
    return "'" + str(text).replace("'", "''") + "'"


if __name__ == "__main__":
    main()

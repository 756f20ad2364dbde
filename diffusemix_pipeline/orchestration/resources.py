"""What every asset is given: typed settings, the project's paths, and who hears of progress."""

import json
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import dagster as dg

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_json
from diffusemix_pipeline.layers import check
from diffusemix_pipeline.locks import using_edits
from diffusemix_pipeline.orchestration.holding import held_for_run
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Executor, Section, Settings
from diffusemix_pipeline.workers import end_with_parent

RESOURCE_KEYS = {"settings", "project", "progress"}
_LOG_EVERY_SECONDS = 20.0
_LOG_EVERY_SHARE = 0.02  # of the time that it took so far

MakeProgress = Callable[[dg.DagsterLogManager], Progress]


def settings_resource(defaults: Settings) -> dg.ResourceDefinition:
    """Return the settings as one typed resource whose launchpad starts from `defaults`.

    Dagster's schema refuses unknown keys and wrong types in the launchpad; ranges are refused here,
    when the first step starts and before it does any work.
    """

    def read(context: dg.InitResourceContext) -> Settings:
        try:
            return check(context.resource_config)
        except UserError as error:
            raise dg.Failure(str(error), allow_retries=False) from None

    return dg.ResourceDefinition(
        read,
        config_schema=_shape(Settings, defaults),
        description="Every setting; `diffusemix settings` prints them with their origins.",
    )


def project_resource(project: Project, executor: Executor) -> dg.ResourceDefinition:
    """Return the project's paths as a resource, which one run at a time can hold.

    The steps of one run may be processes of their own: they share its hold. Those that the run's
    process started end where that is killed, or they would hold the project without it.
    """

    def hold(context: dg.InitResourceContext) -> Iterator[Project]:
        if executor == "multiprocess":
            end_with_parent()
        assert context.instance is not None  # every run has one
        assert context.run_id and context.log
        held = held_for_run(project, context.run_id, executor, context.instance, context.log)
        with held, using_edits(project):
            yield project

    return dg.ResourceDefinition(hold, description="Where the project's files lie.")


class JsonValues(dg.IOManager):
    """Keeps what one step tells another (counts, numbers of shards) as JSON: nothing is pickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Write one output."""
        write_json(self._path(context), obj)

    def load_input(self, context: dg.InputContext) -> Any:
        """Read the output that an input comes from."""
        assert context.upstream_output is not None
        return json.loads(self._path(context.upstream_output).read_text(encoding="utf-8"))

    def _path(self, context: dg.OutputContext) -> Path:
        return self._folder.joinpath(*context.get_identifier()).with_suffix(".json")


def values_resource(project: Project) -> dg.IOManagerDefinition:
    """Return what carries small values from step to step."""
    return dg.IOManagerDefinition.hardcoded_io_manager(
        JsonValues(project.dagster / "values"), "What one step tells another, as JSON."
    )


def progress_resource(make_progress: MakeProgress) -> dg.ResourceDefinition:
    """Return what makes a step's progress listener from its log."""
    return dg.ResourceDefinition.hardcoded_resource(make_progress, "Who hears of long work.")


def log_progress(log: dg.DagsterLogManager) -> Progress:
    """Tell a step's log how long work goes, seldom: each line is a row in Dagster's database.

    The longer it goes, the more seldom: 50 lines in the first quarter of an hour, 275 in a day.
    """
    started: dict[str, float] = {}
    told: dict[str, float] = {}

    def tell(description: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = started.setdefault(description, now)
        pause = max(_LOG_EVERY_SECONDS, _LOG_EVERY_SHARE * (now - start))
        if now - told.setdefault(description, now) >= pause and 0 < done < total:
            told[description] = now
            left = (now - start) / done * (total - done)
            log.info(f"{description}: {done} of {total}, about {left:.0f} s left")

    return tell


def _shape(section: type[Section], values: Section) -> dict[str, dg.Field]:
    """Translate a settings section into Dagster's config schema, `values` being the defaults."""
    shape = {}
    for name, field in section.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, Section):
            shape[name] = dg.Field(_shape(type(value), value), description=type(value).__doc__)
        else:
            shape[name] = dg.Field(
                _config_type(f"{section.__name__}_{name}", field.annotation),
                default_value=value,
                description=field.description,
            )
    return shape


def _config_type(name: str, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return dg.Enum(name, [dg.EnumValue(value) for value in arguments])
    if origin is typing.Annotated:
        return _config_type(name, arguments[0])
    if origin is list:
        return dg.Array(_config_type(name, arguments[0]))
    if origin in (types.UnionType, typing.Union):
        return dg.Noneable(_config_type(name, arguments[0]))
    return annotation

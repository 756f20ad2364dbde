"""What every asset is given: typed settings, the project's paths, and who hears of progress."""

import shutil
import time
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import dagster as dg
from filelock import FileLock, Timeout

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Section, Settings, check

RESOURCE_KEYS = {"settings", "project", "progress"}
_LOG_EVERY_SECONDS = 20.0

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


def project_resource(project: Project) -> dg.ResourceDefinition:
    """Return the project's paths as a resource, which one run at a time can hold."""

    def hold(context: dg.InitResourceContext) -> Iterator[Project]:
        project.state.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(project.state / "run.lock", timeout=0):
                shutil.rmtree(project.aside, ignore_errors=True)  # what killed runs left there
                yield project
        except Timeout:
            raise dg.Failure(
                f"Another run is at work in {project.root}. Wait for it to end.",
                allow_retries=False,
            ) from None

    return dg.ResourceDefinition(hold, description="Where the project's files lie.")


def progress_resource(make_progress: MakeProgress) -> dg.ResourceDefinition:
    """Return what makes a step's progress listener from its log."""
    return dg.ResourceDefinition.hardcoded_resource(make_progress, "Who hears of long work.")


def log_progress(log: dg.DagsterLogManager) -> Progress:
    """Tell a step's log how long work goes, seldom: each line is a row in Dagster's database."""
    started: dict[str, float] = {}
    told: dict[str, float] = {}

    def tell(description: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = started.setdefault(description, now)
        if now - told.setdefault(description, now) >= _LOG_EVERY_SECONDS and 0 < done < total:
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

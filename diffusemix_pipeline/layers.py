"""Where settings come from: presets, files, the environment, the command line, and who set what.

Each over the one before: built-in defaults, the preset, `diffusemix.yaml`, the file of `--config`,
the environment (`DIFFUSEMIX_EDITING__STEPS=20`), and `--set` or the launchpad.
What belongs here: reading them, and saying what is wrong with one and who gave it. What does not:
which settings there are (`settings.py`).
"""

import difflib
import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diffusemix_pipeline.errors import UserError, without_secrets
from diffusemix_pipeline.settings import Editing, Section, Settings, holds, leaves, value_at

SETTINGS_FILE = "diffusemix.yaml"
NO_PRESET = "none"
ENVIRONMENT_PREFIX = "DIFFUSEMIX_"
_ENVIRONMENT = "environment"
_SHOWN = 200  # characters of a wrong value
_REPR = reprlib.Repr()  # YAML's aliases make values of which a whole one would not fit in memory
_REPR.maxlevel, _REPR.maxstring = 3, 2 * _SHOWN
_SECTIONS = {
    name
    for section in (Settings, Editing)
    for name, field in section.model_fields.items()
    if isinstance(field.default, Section)
}


@dataclass(frozen=True)
class Layer:
    """One source of values: its name for people, the values, and why a value is what it is."""

    name: str
    values: Mapping[str, Any]
    known_from: Mapping[str, str]


@dataclass(frozen=True)
class Setting:
    """One setting as `diffusemix settings` prints it."""

    key: str
    value: Any
    origin: str
    description: str


def preset_names() -> list[str]:
    """Return the names of the presets that the package carries."""
    return sorted(
        path.name[: -len(".yaml")] for path in _presets().iterdir() if path.name.endswith(".yaml")
    )


def load_layers(
    root: Path,
    *,
    preset: str | None = None,
    own_images: bool = False,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> list[Layer]:
    """Read every layer that applies in `root`, lowest first; the preset "none" is no layer.

    With `own_images`, images are given by hand: where the project's settings file names a preset
    that brings images of its own, that preset is left out with a warning, as it fits those alone.
    Raises UserError for a file that is missing or no YAML mapping, and for an unknown preset.
    """
    layers = [_from_environment(environment), Layer("--set", nested_overrides(overrides), {})]
    if config is not None:
        layers.insert(0, _read_yaml(config))
    choosing = list(layers)
    if (root / SETTINGS_FILE).exists():
        layers.insert(0, _read_yaml(root / SETTINGS_FILE))
        preset_there = layers[0].values.get("preset", NO_PRESET)
        if not own_images or not _brings_images(preset_there):
            choosing.insert(0, layers[0])
        elif not any("preset" in layer.values for layer in choosing) and preset is None:
            warnings.warn(
                f"the preset '{preset_there}' of {SETTINGS_FILE} brings its own images, so with "
                "yours it is left out. Another may be chosen with --preset.",
                stacklevel=2,
            )
    named = [layer.values["preset"] for layer in choosing if "preset" in layer.values]
    chosen = preset or (named[-1] if named else NO_PRESET)
    if chosen != NO_PRESET:
        layers.insert(0, _read_preset(chosen))
    return [
        Layer(
            layer.name, {k: v for k, v in layer.values.items() if k != "preset"}, layer.known_from
        )
        for layer in layers
    ]


def merge(layers: Sequence[Layer]) -> Settings:
    """Return the settings that the layers give together; UserError names each wrong value."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge_into(merged, layer.values)
    return check(merged, layers)


def check(values: Mapping[str, Any], layers: Sequence[Layer] = ()) -> Settings:
    """Return `values` as settings; UserError names each wrong one, and its layer."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, layers)) from None


def load_settings(root: Path, **how: Any) -> Settings:
    """Return the settings that apply in `root`; see `load_layers` for the arguments."""
    return merge(load_layers(root, **how))


def describe(layers: Sequence[Layer]) -> list[Setting]:
    """Return every setting with its value, the layer that set it, and its documentation."""
    settings = merge(layers)
    return [
        Setting(key, value_at(settings.model_dump(), key), _origin_of(key, layers), description)
        for key, description in leaves(Settings)
    ]


def _presets() -> Any:
    return resources.files("diffusemix_pipeline") / "presets"


def _read_preset(name: str) -> Layer:
    if name not in preset_names():
        raise UserError(f"There is no preset '{name}'. Choose one of: {', '.join(preset_names())}.")
    content = yaml.safe_load((_presets() / f"{name}.yaml").read_text(encoding="utf-8"))
    return Layer(f"preset {name}", content["settings"], content.get("known_from", {}))


def _brings_images(preset: str) -> bool:
    return preset != NO_PRESET and "path" in _read_preset(preset).values.get("source", {})


class _Loader(yaml.SafeLoader):
    """Plain values alone, and each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is set twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> Any:
    return _Loader(text).get_single_data()


def _read_yaml(path: Path) -> Layer:
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"The settings file {path} is not YAML: {error}") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"The settings file {path} must hold 'key: value' lines.")
    return Layer(path.name, content or {}, {})


def _from_environment(environment: Mapping[str, str]) -> Layer:
    values: dict[str, Any] = {}
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".")
            _merge_into(values, _nested(key, _parse(text, name)))
    return Layer(_ENVIRONMENT, values, {})


def nested_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return `key.path=value` texts as nested values; UserError for one that is none."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"--set {text}: write it as key.path=value, e.g. --set editing.steps=20."
            )
        _merge_into(values, _nested(key.strip(), _parse(value, f"--set {key}")))
    return values


def _parse(text: str, name: str) -> Any:
    try:
        return _parsed(text)
    except (yaml.YAMLError, RecursionError):
        raise UserError(f"{name}: '{text}' is not a YAML value; put text in quotes.") from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge_into(merged: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if value is None and key in _SECTIONS:
            continue  # `editing:` with nothing below it
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            _merge_into(merged[key], value)
        else:
            merged[key] = _copied(value)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _origin_of(key: str, layers: Sequence[Layer]) -> str:
    for layer in reversed(layers):
        if holds(layer.values, key):
            why = layer.known_from.get(key)
            return f"{layer.name} ({why})" if why else layer.name
    return "default"


def _explain(error: ValidationError, layers: Sequence[Layer]) -> str:
    known = [key for key, _ in leaves(Settings)]
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        named = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
        origin = _origin_of(named, layers)
        where = f" (from {origin})" if layers else ""
        if problem["type"] == "extra_forbidden":
            near = _nearest(key, known)
            if origin == _ENVIRONMENT:
                near = f"{_variable(near)}, with two underscores after each section's name"
                key = _variable(key)
            lines.append(f"{key}{where}: there is no such setting. Did you mean {near}?")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            value = _REPR.repr(without_secrets(given) if isinstance(given, str) else given)
            value = without_secrets(value)
            value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
            if problem["type"] == "list_type" and isinstance(given, str | int | float):
                inner = value.strip("'\"")
                message = f"write a list, in brackets: [{inner}]"
            lines.append(f"{key} = {value}{where}: {message[0].lower()}{message[1:]}.")
    return "\n".join(lines)


def _variable(key: str) -> str:
    """Return the environment variable that stands for a setting."""
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "__")


def _nearest(key: str, known: Sequence[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    by_name = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == last]
    near = by_name or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return near[0]

"""YAML files, presets and ``key=value`` overrides, made into a frozen, checked settings object."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from soju.core.errors import ConfigError, UserError


class Settings(BaseModel):
    """Base of all configuration: frozen, unknown keys refused, the help of a field is the docstring under it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of settings and what they are called now; a former name is refused with the new one."""


_SHOWN = 120
"""Characters of a wrong value that an error shows."""
_PRESETS = Path(__file__).parents[1] / "presets"

ConfigT = TypeVar("ConfigT", bound=Settings)
Overrides = Sequence[str] | Mapping[str, Any]
"""Settings to change: ``["data.seed=7"]``, each value read as YAML, or ``{"data.seed": 7}``."""


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(path.stem for path in _PRESETS.rglob("*.yaml"))


def preset_text(name: str) -> str:
    """Return the YAML of a preset with its comments (`UserError` if there is none of that name)."""
    for path in _PRESETS.rglob("*.yaml"):
        if path.stem == name:
            return path.read_text(encoding="utf-8")
    raise UserError(f'no preset is called "{name}"; there are {", ".join(preset_names())}')


def read_config(name: str | Path, overrides: Overrides = ()) -> tuple[dict[str, Any], str]:
    """Read a YAML file or a preset, with overrides set; nothing is checked against a recipe yet.

    Returns the settings as plain values and the text to keep with a run: the YAML, then a comment for each override.
    Raises `UserError` if there is no such file or preset, or it is not YAML.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        text = _read_text(path)
    elif str(name) in preset_names():
        text = preset_text(str(name))
    else:
        raise UserError(f'"{name}" is neither a YAML file nor a preset; presets: {", ".join(preset_names())}')
    values = apply_overrides(parse_yaml(text, place=str(name)), overrides)
    return values, text + "".join(f"# override: {override}\n" for override in _texts(overrides))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check the path, or see `soju presets`") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8; save the file as UTF-8") from None


def parse_yaml(text: str, *, place: str) -> dict[str, Any]:
    """Parse one YAML mapping; `place` is named in errors (`ConfigError` if it is not YAML, or not a mapping)."""
    try:
        value = _load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{place}{where}: {problem}; check the indentation and the quotes there") from None
    except ValueError as error:  # looks like a date or a number and is none: 2026-13-01
        raise ConfigError(f"{place}: {error}; quote the value") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: a mapping of settings was expected; start from `soju presets NAME`")
    return value


def _load(text: str) -> Any:
    try:
        return _UniqueKeyLoader(text).get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key given twice instead of keeping the last."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`; construct_mapping merges
            continue
        key = str(loader.construct_object(key_node, deep=True))
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f'"{key}" is given twice', problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def apply_overrides(values: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return a copy of `values` with overrides set.

    >>> apply_overrides({"data": {"seed": 1}}, ["data.seed=2"])
    {'data': {'seed': 2}}

    Raises `ConfigError` if an override is not ``key=value`` or goes through something that is not a mapping.
    """
    result = _copy(values)
    for override in _texts(overrides):
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f'override "{override}": expected key=value, for example data.seed=7')
        if isinstance(overrides, Mapping):
            value = overrides[key]
        else:
            try:
                value = _load(text)
            except (yaml.YAMLError, ValueError):
                raise ConfigError(f'override "{override}": the value is not valid YAML; quote it') from None
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            step = target.setdefault(parent, {})
            if not isinstance(step, dict):
                raise ConfigError(f'override "{override}": "{parent}" is a value, not a group of settings')
            target = step
        target[last] = value
    return result


def _texts(overrides: Overrides) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={value}" for key, value in overrides.items()]
    return list(overrides)


def validate(values: Mapping[str, Any], model: type[ConfigT], *, place: str) -> ConfigT:
    """Turn plain values into a frozen settings object.

    Raises `ConfigError` with one line for each wrong setting: its place (`place` names the source), what is wrong, the
    remedy.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [explain(place, item, model) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def explain(place: str, item: Any, model: type[BaseModel]) -> str:
    """Return the line for one error of pydantic: its place, what is wrong, the remedy."""
    path = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    section, path = _section_at(model, path)
    where = ".".join(map(str, path))
    if item["type"] == "extra_forbidden":
        if new := getattr(section, "renamed", {}).get(str(path[-1])):
            return f'{place}: {where}: the setting is called "{new}" now; rename it'
        known = list(section.model_fields)
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        remedy = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        return f"{place}: {where}: unknown setting; {remedy}"
    if item["type"] == "missing":
        return f"{place}: {where}: missing; add it"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{place}: {where}: {message}" if where else f"{place}: {message}"
    got = repr(item["input"])
    got = got if len(got) <= _SHOWN else got[:_SHOWN] + "..."
    return f"{place}: {where}: got {got}; {message[0].lower()}{message[1:]}"


def _section_at(model: type[BaseModel], path: Sequence[str | int]) -> tuple[type[BaseModel], list[str | int]]:
    """Return the last section on a path, and the path as the user wrote it: the tag of a union names its class only."""
    choices, discriminator, written = [model], None, []
    for part in path:
        if isinstance(discriminator, str) and (
            tagged := [one for one in choices if _is_tagged(one, discriminator, part)]
        ):
            model, choices, discriminator = tagged[0], tagged, None
            continue
        written.append(part)
        if field := model.model_fields.get(str(part)):
            choices, discriminator = list(_models_in(field.annotation)), field.discriminator
            model = next(iter(choices), model)
    return model, written


def _is_tagged(model: type[BaseModel], discriminator: str, tag: str | int) -> bool:
    return tag in get_args(model.model_fields[discriminator].annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def to_yaml(config: Settings) -> str:
    """Write every setting, defaults included, as YAML that reads back as the same settings."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, allow_unicode=True, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that escapes Unicode line breaks, which YAML would read as other white space."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_BREAKS.intersection(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_LINE_BREAKS = frozenset("\x85\u2028\u2029")
_Dumper.add_representer(str, _represent_text)

"""Settings of a run as a file: read from YAML or TOML with every problem named at once, and written back."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .networks import network_arguments, sized_network
from .settings import Settings
from .settings_rules import CHOICES, NO_PATHS, PATHS, RANGES, rule_problems

# YAML 1.1 takes a number with an exponent and no point for text.
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_FRACTION = re.compile(r"(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)")
_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "names with values"}


class SettingsError(ValueError):
    """Settings that cannot be run. problems: one sentence each."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        lines = "".join(f"\n  {problem}" for problem in problems) if len(problems) > 1 else f" {problems[0]}"
        super().__init__(f"{source}:{lines}")


def read_settings(path: str | Path, changes: Sequence[str] = ()) -> Settings:
    """The settings in a YAML (``.yaml``, ``.yml``) or TOML (``.toml``) file.

    Names are those of `Settings` and its parts, nested: ``data: {sources: [{path: photos}]}``. Relative paths are taken
    from the file's folder, and come back absolute. A published size in ``network`` comes back as its arguments.

    changes: ``path.to.name=value`` each, in place of what the file says; values are YAML, and relative paths are taken
    from the current folder. List entries are numbered from 0: ``data.sources.0.repeats=3``.

    Raises:
        SettingsError: names all problems: unknown names, wrong types, values out of range, and settings that would have
            no effect on this target. What is not written counts for nothing there.
        OSError: the file cannot be read.
    """
    path = Path(path)
    document = _parse(path)
    for change in changes:
        _change(document, change)
    return settings_from(document, Path(os.path.abspath(path)).parent, path.name)


def settings_from(document: Mapping[str, Any], folder: Path, source: str = "settings") -> Settings:
    """The settings in nested plain values; see `read_settings`. `folder` is where relative paths begin."""
    reader = _Reader(folder)
    settings = reader.dataclass(Settings, document, "")
    if settings is not None:
        reader.problems += rule_problems(settings, reader.written)
    if reader.problems:
        raise SettingsError(source, reader.problems)
    assert settings is not None
    return settings


def write_settings(settings: Settings) -> str:
    """The settings as YAML that `read_settings` reads back to equal ones: everything that is not the default.

    Raises:
        SettingsError: they hold something that a file may not, such as a setting without effect.
    """
    import yaml

    document = _plain(settings)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    settings_from(yaml.safe_load(text), Path(), "settings")
    return text


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        values = {}
        for field in fields(value):
            current = getattr(value, field.name)
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if current != default:
                values[field.name] = _plain(current)
        return values
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return value


class _Reader:
    """Builds settings from plain values. problems: what is wrong so far. written: dotted names that were there."""

    def __init__(self, folder: Path):
        self.folder, self.problems = folder, []
        self.written: set[str] = set()

    def dataclass(self, kind: type, data: Any, where: str) -> Any:
        """An instance, with defaults where a value is wrong; None where it cannot be built."""
        if not isinstance(data, Mapping):
            names = ", ".join(field.name for field in fields(kind))
            self._found(where, data, f"settings by name ({names})")
            return None
        types = get_type_hints(kind)
        for name in data:
            if name not in types:
                self._unknown(str(name), where, list(types))
        values, whole = {}, True
        for field in fields(kind):
            path = f"{where}.{field.name}" if where else field.name
            if field.name in data:
                self.written.add(_plain_name(path))
                value = self._value(types[field.name], data[field.name], path)
                if value is not None:
                    values[field.name] = value
            elif field.default is MISSING and field.default_factory is MISSING:
                self.problems.append(f"`{path}` is missing: {_missing(path)}.")
            required = field.default is MISSING and field.default_factory is MISSING
            whole = whole and (field.name in values or not required)
        if not whole:
            return None
        if kind is Settings:
            values["network"] = self._network(values["target"], values.get("network", {}))
        return kind(**values)

    def _value(self, kind: Any, value: Any, path: str) -> Any:
        """The value as the type asks, None where it is wrong."""
        if is_dataclass(kind):
            return self.dataclass(kind, value, path)
        if get_origin(kind) is tuple:
            return self._entries(get_args(kind)[0], value, path)
        name = _plain_name(path)
        converted = _converted(kind, value, fractions=name == "data.buckets")
        if converted is None:
            self._found(path, value, _WORDS[kind])
            return None
        if name in CHOICES and converted not in CHOICES[name]:
            near = difflib.get_close_matches(converted, CHOICES[name], 1, 0.5)
            hint = f"did you mean {near[0]}" if near else "choose one"
            self.problems.append(f"`{path}` is {converted!r}, expected one of {', '.join(CHOICES[name])}: {hint}.")
            return None
        if name in RANGES and converted not in RANGES[name]:
            self.problems.append(f"`{path}` is {converted:g}, expected {RANGES[name]}.")
            return None
        if name in PATHS and converted not in NO_PATHS:
            return os.path.abspath(self.folder / Path(converted).expanduser())
        return converted

    def _entries(self, kind: Any, value: Any, path: str) -> tuple | None:
        if not isinstance(value, list | tuple):
            self._found(path, value, "a list")
            return None
        entries = [self._value(kind, entry, f"{path}[{i}]") for i, entry in enumerate(value)]
        return tuple(entry for entry in entries if entry is not None)

    def _network(self, target: str, network: dict) -> dict:
        known = network_arguments(target)
        for name in network:
            if known is not None and name not in known and name != "size":
                self._unknown(str(name), "network", known)
        try:
            return sized_network(target, network)
        except ValueError as error:
            self.problems.append(str(error))
            return network

    def _found(self, path: str, value: Any, expected: str) -> None:
        found, hint = _described(value), ""
        if expected == "text" and isinstance(value, bool | int | float | list):
            hint = ": put it in quotes"
        elif expected == "a list" and not isinstance(value, Mapping):
            hint = f": write [{value}]"
        elif expected in ("a number", "a whole number") and isinstance(value, str):
            hint = ": write digits without quotes"
        self.problems.append(f"`{path}` is {found}, expected {expected}{hint}.")

    def _unknown(self, name: str, where: str, allowed: list[str]) -> None:
        path = f"{where}.{name}" if where else name
        near = difflib.get_close_matches(name, allowed, 1, 0.7)
        elsewhere = [other for other in _ALL_NAMES if other.rsplit(".", 1)[-1] == name]
        if near:
            hint = f", did you mean `{near[0]}`"
        elif elsewhere and where != "network":
            hint = f", did you mean `{elsewhere[0]}`"
        else:
            hint = ""
        self.problems.append(
            f"`{path}` is unknown{hint}; {f'`{where}`' if where else 'a run'} has {', '.join(allowed)}."
        )


def _names(kind: type, where: str = "") -> list[str]:
    """Dotted names of all settings of a dataclass."""
    names = []
    for name, hint in get_type_hints(kind).items():
        inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
        names += _names(inner, f"{where}{name}.") if is_dataclass(inner) else [f"{where}{name}"]
    return names


_ALL_NAMES = _names(Settings)


def _plain_name(path: str) -> str:
    return re.sub(r"\[\d+\]", "", path)


def _missing(path: str) -> str:
    if path == "target":
        return f"say what to train, one of {', '.join(CHOICES['target'])}"
    return {"output": "name the folder of the run"}.get(path, "every entry needs it")


def _converted(kind: type, value: Any, fractions: bool) -> Any:
    """`value` as `kind`, None where it is something else."""
    if kind in (str, bool):
        return value if type(value) is kind else None
    if kind is dict:
        return dict(value) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        if _EXPONENT.fullmatch(value):
            value = float(value)
        elif fractions and (match := _FRACTION.fullmatch(value)) and float(match[2]):
            value = float(match[1]) / float(match[2])
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) == float("inf") or value != value:
        return None
    if kind is int:
        return int(value) if value == int(value) else None
    return float(value)


def _described(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a group of settings"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the list {value}"[:80] if isinstance(value, list | tuple) else f"{value}"


def _parse(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise SettingsError(
            path.name, [f"The suffix is {suffix or 'missing'}, expected .yaml or .toml: rename the file."]
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        document = _parse_toml(text) if suffix == ".toml" else _parse_yaml(text)
    except ValueError as error:  # not UTF-8, or not of that format
        reason = " ".join(str(error).split())
        raise SettingsError(path.name, [f"This is no valid {suffix[1:]}: {reason}; correct that place."]) from error
    if not isinstance(document, dict):
        raise SettingsError(path.name, [f"The file holds {_described(document)}, expected settings by name: add some."])
    return document


def _parse_toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name that is given twice, which YAML leaves to its readers and PyYAML lets win silently."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag.endswith(":str")]
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                raise ValueError(f"'{twice}' is given twice, the second time near line {node.end_mark.line}")
            return super().construct_mapping(node, deep)

    loader = Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    finally:
        loader.dispose()


def _change(document: dict[str, Any], change: str) -> None:
    """Set one value in nested plain values, from ``path.to.name=value``."""
    name, equals, text = change.partition("=")
    keys = [int(key) if key.isdigit() else key for key in re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")]
    if not equals or "" in keys:
        raise SettingsError(f"--set {change}", ["Expected NAME=VALUE, such as optimizer.learning_rate=1e-4."])
    value = _parse_yaml(text)
    path = ".".join(str(key) for key in keys if not isinstance(key, int))
    if path in PATHS and isinstance(value, str) and value not in NO_PATHS:
        value = os.path.abspath(os.path.expanduser(value))
    place: Any = document
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(place, list):
            if not isinstance(key, int) or key > len(place):
                raise SettingsError(
                    f"--set {change}", [f"`{name}` meets a list of {len(place)}: give a number, 0 is the first."]
                )
            if key == len(place):
                place.append(None)
        elif not isinstance(place, dict):
            raise SettingsError(f"--set {change}", [f"`{name}` goes below a setting that has no parts: shorten it."])
        elif key not in place:
            place[key] = None
        if following is None:
            place[key] = value
        else:
            if place[key] is None:
                place[key] = [] if isinstance(following, int) else {}
            place = place[key]

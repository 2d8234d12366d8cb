"""Configurations: nested frozen dataclasses, to readable JSON and back, overridden by ``field.sub=value`` words.

A field holds a scalar, a ``Literal``, a tuple, another configuration, or one of several (a union of dataclasses,
written to JSON with a ``kind`` key that holds the class name). Anything else is a programming error and says so.
"""

import ast
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin


class ConfigError(ValueError):
    """A configuration that cannot be used; its message is one sentence for the person who wrote it."""


def to_dict(config) -> Any:
    """Plain JSON values (dicts, lists, scalars) of a configuration; every dataclass carries its ``kind``."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
        return {"kind": type(config).__name__, **fields}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"a configuration holds scalars, tuples and dataclasses, not {type(config).__name__}: {config!r}")


def to_json(config) -> str:
    return json.dumps(to_dict(config), indent=2)


def from_json[T](cls: type[T], text: str, where: str = "config") -> T:
    """The configuration that ``to_json`` wrote; raises ConfigError as ``from_dict`` does, and where it is not JSON."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    return from_dict(cls, value, where)


def from_dict(hint, value, where: str = "config") -> Any:
    """The configuration of type ``hint`` that ``to_dict`` wrote as ``value``.

    Raises:
      ConfigError: an unknown field or kind, a missing field, or a value of the wrong type; names the path.
    """
    if _is_config(hint):
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a {hint.__name__}, got {value!r}")
        given = {name: item for name, item in value.items() if name != "kind"}
        if value.get("kind", hint.__name__) != hint.__name__:
            raise ConfigError(f"{where}.kind must be {hint.__name__}, got {value['kind']!r}")
        hints = typing.get_type_hints(hint)
        for name in given:
            _require_field(hint, name, where)
        made = {name: from_dict(hints[name], item, f"{where}.{name}") for name, item in given.items()}
        missing = [f.name for f in dataclasses.fields(hint) if _is_required(f) and f.name not in made]
        if missing:
            raise ConfigError(f"{where} ({hint.__name__}) needs {', '.join(missing)}")
        return _construct(hint, made, where)
    if _is_union(hint):
        return _from_union(hint, value, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        item_hints = get_args(hint)
        if len(item_hints) == 2 and item_hints[1] is Ellipsis:
            item_hints = item_hints[:1] * len(value)
        if len(item_hints) != len(value):
            raise ConfigError(f"{where} must have {len(item_hints)} items, got {len(value)}")
        pairs = zip(item_hints, value, strict=True)
        return tuple(from_dict(h, item, f"{where}.{i}") for i, (h, item) in enumerate(pairs))
    return _scalar(hint, value, where)


def override[T](config: T, word: str) -> T:
    """``config`` with one ``field.sub=value`` word applied.

    An item of a tuple is addressed by its index or its ``name``. The value is read as a Python or JSON literal where it
    is one, else as text; ``a,b`` is a tuple where a tuple is due; the bare name of a kind (``data.source=TextFiles``)
    takes that kind with its defaults.

    Raises:
      ConfigError: not of the form, an unknown field, or a value of the wrong type.
    """
    path, equals, text = word.partition("=")
    if not equals or not path:
        raise ConfigError(f"an override must read field.sub=value, got {word!r}")
    return _override(config, path.split("."), text, type(config), "")


def fields_of(config, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(path, type, value) of every scalar or tuple-of-scalars field, depth first: what ``--help`` lists."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            if _is_union(hints[field.name]):
                yield path, type_name(hints[field.name]), type(value).__name__
            yield from fields_of(value, f"{path}.")
        elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value):
            for index, item in enumerate(value):
                yield from fields_of(item, f"{path}.{getattr(item, 'name', index)}.")
        else:
            yield path, type_name(hints[field.name]), value


def type_name(hint) -> str:
    """A type as a person reads it: ``int``, ``float or none``, ``'a' | 'b'``."""
    if _is_union(hint):
        return " or ".join(type_name(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return f"tuple of {type_name(get_args(hint)[0])}" if get_args(hint) else "tuple"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _override(config, path: list[str], text: str, hint, where: str) -> Any:
    head, rest = path[0], path[1:]
    where = f"{where}.{head}" if where else head
    if isinstance(config, tuple):
        names = [getattr(item, "name", str(index)) for index, item in enumerate(config)]
        if head not in names and not (head.isdigit() and int(head) < len(config)):
            raise ConfigError(f"{where} is unknown: the items are {', '.join(names)}")
        index = names.index(head) if head in names else int(head)
        args = get_args(_tuple_option(hint))
        item_hint = args[0] if len(args) == 2 and args[1] is Ellipsis else args[index]
        current = config[index]
        new = _override(current, rest, text, item_hint, where) if rest else _parse(item_hint, text, where)
        return (*config[:index], new, *config[index + 1 :])
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"{where} is unknown: {where.rpartition('.')[0]} is {config!r}, which has no fields")
    _require_field(type(config), head, where.rpartition(".")[0])
    field_hint = typing.get_type_hints(type(config))[head]
    current = getattr(config, head)
    new = _override(current, rest, text, field_hint, where) if rest else _parse(field_hint, text, where)
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    return _construct(type(config), {**given, head: new}, where)


def _parse(hint, text: str, where: str) -> Any:
    options = get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if _is_config(option) and option.__name__ == text:
            return from_dict(option, {}, where)
    many = _tuple_option(hint)
    # What looks like a number may still be meant as text, or as one item of a tuple.
    maybe_text = many is not None or any(option is str or get_origin(option) is Literal for option in options)
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        try:
            return from_dict(hint, value, where)
        except ConfigError:
            if not maybe_text:
                raise
    if many is None:
        return from_dict(hint, text, where)
    items, args = [item.strip() for item in text.strip("()[]").split(",") if item.strip()], get_args(many)
    if len(args) == 2 and args[1] is Ellipsis:
        args = args[:1] * len(items)
    if len(args) != len(items):
        raise ConfigError(f"{where} must have {len(args)} items, got {len(items)}")
    return tuple(_parse(arg, item, f"{where}.{i}") for i, (arg, item) in enumerate(zip(args, items, strict=True)))


def _tuple_option(hint):
    """The tuple type that ``hint`` is or allows, or None."""
    options = get_args(hint) if _is_union(hint) else (hint,)
    return next((option for option in options if get_origin(option) is tuple), None)


def _scalar(hint, value, where: str):
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where} must be {type_name(hint)}, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, got {value!r}")
    if hint is type(None) and value is None:
        return None
    if hint in (bool, int, float, str):
        if type(value) is not hint:
            raise ConfigError(f"{where} must be {type_name(hint)}, got {value!r}")
        return value
    raise TypeError(f"{where}: a configuration field cannot have type {hint}")


def _from_union(hint, value, where: str):
    options = get_args(hint)
    kinds = {option.__name__: option for option in options if _is_config(option)}
    if dataclasses.is_dataclass(value):
        value = to_dict(value)
    if isinstance(value, dict) and kinds:
        if value.get("kind") not in kinds:
            raise ConfigError(f"{where}.kind must be one of {', '.join(kinds)}, got {value.get('kind')!r}")
        return from_dict(kinds[value["kind"]], value, where)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is type(None) or dataclasses.is_dataclass(option):
            continue
        try:
            return from_dict(option, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} must be {type_name(hint)}, got {value!r}")


def _is_config(hint) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_union(hint) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _require_field(cls: type, name: str, where: str) -> None:
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        listed = f": its fields are {', '.join(names)}" if names else ", which has none"
        hint = f"; did you mean {close[0]}?" if close else listed
        raise ConfigError(f"{where + '.' if where else ''}{name} is not a field of {cls.__name__}{hint}")


def _construct(cls: type, fields: dict, where: str):
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error

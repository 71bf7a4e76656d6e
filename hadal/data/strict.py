"""Strict tables: TOML into frozen dataclasses; an unknown key is refused, with what was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECTIONS_OF = {  # sections that tell one kind of recipe from the others
    **dict.fromkeys(("objective", "sample", "tasks", "reward"), "`hadal grpo`"),
    "lora": "`hadal sft` and `hadal grpo`",
    **dict.fromkeys(("init", "needles", "phases"), "`hadal train`"),
    **dict.fromkeys(("balance", "data", "ema"), "`hadal train` and `hadal sft`"),
    **dict.fromkeys(("estimate", "measure", "stages"), "`hadal r1`"),
    **dict.fromkeys(("decontaminate", "duplicates", "fim", "mixture", "source"), "`hadal data prepare`"),
}


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the key, the value and the remedy."""


def require(ok: bool, key: str, value: object, want: str) -> None:
    """Raise RecipeError unless `ok`."""
    if not ok:
        raise RecipeError(f"{key} is {value!r}; it must be {want}")


def half_character(value: Any) -> str:
    r"""Which half of a character some text in plain data holds, and what to do; empty if none. JSON can write
    one ("\ud800", cut out of a pair), but it is no Unicode, and no tokenizer reads it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        before = error.object[max(0, error.start - 20) : error.start]
        code = ord(error.object[error.start])
        return f"a lone surrogate U+{code:04X} behind {before!r}: half a character; write the whole one"
    return ""


def read_toml(
    path: Path, overrides: Sequence[str] = (), example: str = "data-example", *, sections_only: bool = False
) -> dict[str, Any]:
    """The tables of a TOML file, or of the recipe.json of a run, with overrides of the form
    "section.key=value" applied. Raises RecipeError, which names `example` where there is no such file.
    `sections_only`: no key stands outside a section."""
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; recipes/{example}.toml is one to start from") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; a recipe is a file in it, such as {path}/NAME.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise RecipeError(f"{path} is not valid {kind}: {error}") from None
    if not isinstance(table, dict):
        raise RecipeError(f"{path} does not hold a JSON object")
    for override in overrides:
        _override(table, override, (2,) if sections_only else (1, 2))
    return table


def overridden(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The table with overrides as `read_toml` takes them, for a recipe that is no file. Raises
    RecipeError."""
    for override in overrides:
        _override(table, override, (1, 2))
    return table


def _override(table: dict[str, Any], text: str, depths: tuple[int, ...]) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) not in depths or not all(parts):
        raise RecipeError(f"--set {text!r} is not of the form section.key=value, e.g. run.name=mine")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    inner: Any = table if len(parts) == 1 else table.setdefault(parts[0], {})
    if not isinstance(inner, dict):
        raise RecipeError(f"--set {text!r}: {parts[0]!r} is not a section of the recipe")
    inner[parts[-1]] = parsed


def override_phase(phases: object, text: str) -> None:
    """Apply "phases.NAME.key=value" to a list of named tables. Raises RecipeError."""
    left, _, value = text.partition("=")
    parts = left.strip().split(".")
    found = [p for p in phases if isinstance(p, dict)] if isinstance(phases, list) else []
    table = next((p for p in found if len(parts) == 3 and p.get("name") == parts[1]), None)
    if table is None:
        names = ", ".join(str(p.get("name")) for p in found) or "none"
        raise RecipeError(f"--set {text!r} is not of the form phases.NAME.key=value; phases here: {names}")
    inner = {"phase": table}
    _override(inner, f"phase.{parts[2]}={value}", (2,))


def build(kind: type, table: object, path: str = "") -> Any:
    """An instance of the dataclass `kind` from plain tables. Raises RecipeError."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{path or 'the recipe'} is {table!r}; a table is wanted")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = [key for key in table if key not in known]
    if unknown:
        key = next((key for key in unknown if not path and key in SECTIONS_OF), unknown[0])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
        if not path and key in SECTIONS_OF:
            hint = f"Recipes of {SECTIONS_OF[key]} have it: is this one of those?"
        raise RecipeError(f"unknown key {join(path, key)!r} in the recipe. {hint}")
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in table:
            values[f.name] = _convert(hints[f.name], table[f.name], join(path, f.name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise RecipeError(f"the recipe lacks {join(path, f.name)!r}")
    return kind(**values)


def _convert(kind: Any, value: object, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list | tuple):
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise RecipeError(f"{path} is {value!r}; {len(items)} values are wanted")
        return tuple(_convert(items[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind is int and float(value).is_integer():
            return int(value)
        if kind is float:
            return float(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if origin is types.UnionType and type(value) in items:
        return value
    wanted = kind.__name__ if isinstance(kind, type) else "a table" if origin is not tuple else "a list"
    wanted = str(kind) if origin is types.UnionType else wanted
    raise RecipeError(f"{path} is {value!r}; {wanted} is wanted")


def join(path: str, key: str) -> str:
    """The dotted name of a key."""
    return f"{path}.{key}" if path else key

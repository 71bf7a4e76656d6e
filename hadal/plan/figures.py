"""A number and where it comes from; and the dated data files that numbers come from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

SHAPES = "arithmetic on the model's shapes"


class PlanError(ValueError):
    """A question that cannot be answered; the message names the cause, the value and the remedy."""


class PriceMissing(PlanError):
    """A price that is not known and was not given; what needs no price can be answered without it."""


@dataclass(frozen=True)
class Figure:
    """One number with its provenance. `formula`: the arithmetic, with its values where they are few. `low`,
    `high`: pessimistic and best, where efficiencies are in it."""

    name: str
    value: float
    unit: str
    formula: str
    source: str = SHAPES
    date: str = ""
    low: float | None = None
    high: float | None = None

    def as_json(self) -> dict[str, Any]:
        """All that is known of it."""
        found: dict[str, Any] = {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "formula": self.formula,
            "source": self.source,
        }
        if self.date:
            found["date"] = self.date
        if self.low is not None:
            found |= {"low": self.low, "high": self.high}
        return found


@cache
def data(name: str) -> Mapping[str, Any]:
    """The content of `hadal/plan/data/NAME.toml`."""
    return tomllib.loads(files("hadal.plan").joinpath(f"data/{name}.toml").read_text("utf-8"))


def known_keys(what: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Refuses keys that nothing would read, with the nearest that something does."""
    from hadal.config import suggest

    for key in given:
        if key not in allowed:
            raise PlanError(f"{what}: unknown key {key!r}.{suggest(str(key), allowed)}")


def gb(n: float) -> str:
    """Bytes for people, in GB or MB of powers of ten."""
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.0f} MB"

"""What it costs: hours of devices, electricity, tokens of an API, and where one becomes cheaper than another.

    local      = (tokens in / prefill + tokens out / decode) · devices · $ an hour
    own        = the same hours · watts · PUE · $ a kWh
    API        = tokens in · (hits · $hit + misses · $miss) + tokens out · $out
    break-even = fixed cost / (API $ a token − local marginal $ a token)

Prices are dated data (hadal/plan/data/prices.toml, api_prices.toml); none is a default where none is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from math import inf
from typing import Any

from hadal.config import suggest
from hadal.plan.figures import Figure, PlanError, PriceMissing, data
from hadal.plan.machines import Machine


@dataclass(frozen=True)
class ApiPrice:
    """Dollars per million tokens."""

    name: str
    model: str
    since: str
    input_hit: float
    input_miss: float
    output: float
    source: str


def api_prices() -> list[ApiPrice]:
    """All known, in the order of their dates."""
    rows = data("api_prices")["price"]
    found = [ApiPrice(**{("since" if k == "from" else k): v for k, v in row.items()}) for row in rows]
    return sorted(found, key=lambda p: p.since)


def api_price(name: str, on: str | None = None) -> ApiPrice:
    """The price of `name` (deepseek-chat, deepseek-reasoner) on a day (2025-03-01), else the last known."""
    known = api_prices()
    named = [p for p in known if p.name == name.lower()]
    if not named:
        names = sorted({p.name for p in known})
        raise PlanError(f"no price is known for {name!r}.{suggest(name, names)} Known: {', '.join(names)}")
    if on is not None:
        try:
            on = date.fromisoformat(on).isoformat()
        except ValueError:
            raise PlanError(f"{on!r} is no day; give one such as 2025-03-01") from None
    then = [p for p in named if on is None or p.since <= on]
    if not then:
        raise PlanError(f"no price of {name} is known for {on}; the first is from {named[0].since}")
    return then[-1]


def hourly(machine: Machine, given: float | None = None) -> Figure:
    """Dollars an hour for the whole machine. PriceMissing where none is known and none is given."""
    count = machine.count
    if given is not None:
        if given < 0:
            raise PlanError(f"hourly is {given}; a price is not negative")
        return Figure("rent", given * count, "$/h", f"{count} × ${given:g} an hour", "as given")
    for row in data("prices")["hourly"]:
        if row["device"] == machine.device.name:
            formula = f"{count} × ${row['dollars']:g} an hour"
            return Figure("rent", row["dollars"] * count, "$/h", formula, row["source"], row["date"])
    raise PriceMissing(f"no hourly price is known for {machine.device.title}; give a device's (--hourly)")


def power(
    machine: Machine, kwh: float | None = None, watts: float | None = None, pue: float | None = None
) -> Figure:
    """Dollars of electricity an hour, all devices at their full power. PriceMissing without their power."""
    known = data("prices")["electricity"]
    each = watts or machine.device.watts
    if each is None:
        raise PriceMissing(f"the power of {machine.device.title} is not known; give a device's (--watts)")
    price = known["dollars_per_kwh"] if kwh is None else kwh
    over = known["pue"] if pue is None else pue
    if price < 0 or over < 1:
        raise PlanError(f"electricity at ${price} a kWh with a PUE of {over}: not negative, and at least 1")
    source, date = (known["source"], known["date"]) if kwh is None else ("as given", "")
    formula = f"{machine.count} × {each:g} W × PUE {over:g} × ${price:g} a kWh"
    return Figure("electricity", machine.count * each / 1000 * over * price, "$/h", formula, source, date)


def api_cost(price: ApiPrice, tokens_in: float, tokens_out: float, hits: float = 0.0) -> Figure:
    """Dollars for tokens in and out, of which `hits` of those in are found in the cache."""
    if not 0 <= hits <= 1:
        raise PlanError(f"the share of cache hits is {hits}; it lies between 0 and 1")
    each = hits * price.input_hit + (1 - hits) * price.input_miss
    dollars = (tokens_in * each + tokens_out * price.output) / 1e6
    formula = f"{tokens_in:,.0f} in × ${each:.4g}/M ({hits:.0%} hits)"
    formula += f" + {tokens_out:,.0f} out × ${price.output:.4g}/M"
    return Figure(f"API ({price.name}, then {price.model})", dollars, "$", formula, price.source, price.since)


def seconds_of(tokens_in: float, tokens_out: float, prefill: float, decode: float) -> float:
    """Seconds for tokens in and out at these rates, one after the other."""
    return tokens_in / prefill + tokens_out / decode


def break_even(fixed: float, api_per_token: float, local_per_token: float) -> float:
    """Tokens from which on a machine that cost `fixed` dollars is cheaper; infinite if it never is."""
    if fixed < 0:
        raise PlanError(f"a fixed cost of ${fixed} is not one")
    gain = api_per_token - local_per_token
    return fixed / gain if gain > 0 else inf


def experiment(
    tokens_in: float,
    tokens_out: float,
    *,
    rates: Mapping[str, tuple[float, float]],
    an_hour: Figure | None,
    price: ApiPrice | None,
    hits: float = 0.0,
    owned: float | None = None,
) -> list[Figure]:
    """The cost of an experiment here and by API.

    rates: (prefill, decode) tokens/s of the machine by level. an_hour: dollars an hour here; None where they
    are not known, then hours alone are told. owned: dollars that the machine was bought for; then the
    break-even is counted.
    """
    if tokens_in < 0 or tokens_out < 0 or tokens_in + tokens_out == 0:
        raise PlanError(f"{tokens_in:,} tokens in and {tokens_out:,} out are no experiment")
    hours = {
        level: seconds_of(tokens_in, tokens_out, fill, decode) / 3600
        for level, (fill, decode) in rates.items()
    }
    typical, slow, fast = hours["typical"], hours["pessimistic"], hours["best"]
    fill, decode = rates["typical"]
    shown = f"{tokens_in:,.0f} in / {fill:,.0f} a s + {tokens_out:,.0f} out / {decode:,.0f} a s"
    found = [Figure("hours here", typical, "h", shown, "typical efficiencies", "", slow, fast)]
    if an_hour is not None:
        low, local, high = (hours * an_hour.value for hours in (slow, typical, fast))
        formula, source, date = "hours × $ an hour", an_hour.source, an_hour.date
        found += [an_hour, Figure("cost here", local, "$", formula, source, date, low, high)]
    if price is None:
        return found
    api = api_cost(price, tokens_in, tokens_out, hits)
    found.append(api)
    if owned is not None and an_hour is not None:
        tokens = tokens_in + tokens_out
        even = break_even(owned, api.value / tokens, local / tokens)
        there, here = (x / tokens * 1e6 for x in (api.value, local))
        formula = f"${owned:,.0f} / (${there:.3g} − ${here:.3g} a million tokens)"
        found.append(Figure("break-even", even, "tokens", formula, "this mix of tokens in and out"))
    return found


def service_day(nodes: float, devices_a_node: int, dollars_an_hour: float) -> float:
    """Dollars a day for a fleet."""
    return nodes * devices_a_node * dollars_an_hour * 24


def prices_as_json() -> dict[str, Any]:
    """All prices with their dates and sources."""
    return {**data("prices"), "api": data("api_prices")["price"]}

"""Every dependency of pyproject.toml has its reason in docs/architecture.md, and no reason stands alone."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"^[A-Za-z0-9_.-]+")


def plain(name: str) -> str:
    """PyPI treats -, _ and . alike."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, set[str]]:
    """Dependencies by group; the package's own ones under "hadal"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"hadal": project["dependencies"], **project["optional-dependencies"]}
    found = {}
    for group, requirements in groups.items():
        names = [NAME.match(r) for r in requirements]
        found[group] = {plain(m[0]) for m in names if m}
        assert len(found[group]) == len(requirements), requirements
    return found


def explained() -> dict[str, dict[str, str]]:
    """Rows `| group | names | reason |` of the table in docs/architecture.md: reason by group and name."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = text.split("<!-- dependencies: begin -->")[1].split("<!-- dependencies: end -->")[0]
    found: dict[str, dict[str, str]] = {}
    for row in table.strip().splitlines()[2:]:
        group, names, reason = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            found.setdefault(group, {})[plain(name)] = reason
    return found


def test_every_dependency_has_a_reason_and_every_reason_a_dependency() -> None:
    wanted, told = declared(), explained()
    assert {group: set(rows) for group, rows in told.items()} == wanted
    assert all(len(reason) > 20 for rows in told.values() for reason in rows.values())


def test_every_dependency_is_pinned() -> None:
    pins = {plain(m[0]) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
            if (m := NAME.match(line))}  # fmt: skip
    assert not {name for names in declared().values() for name in names} - pins

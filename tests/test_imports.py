"""Holds the house against its plan: who may import whom, and what is never called; by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hadal"

# A room imports only from rooms on lower floors (docs/architecture.md).
FLOOR = {
    "config": 0,
    "plan": 1, "text": 1, "ops": 1,
    "model": 2,
    "weights": 3, "data": 3,
    "engine": 4, "train": 4,
    "post": 5, "serve": 5, "evals": 5, "probe": 5,
    "ui": 6, "bench": 6,
    "cli": 7,
}  # fmt: skip
# An arrow between neighbours: evaluation judges with the verifiers that reward in reinforcement learning, and
# reads the files and takes the votes that they read and take. It leads to no more of `post` than this, and
# nothing leads back: what `post` wants to know of a model is handed to it.
ARROWS = {"evals": ("hadal.post.rewards", "hadal.post.tasks", "hadal.post.vote")}
# What a room must not know although it lies below, and the libraries that its floor has no use for.
ONLY_ROOMS = {"plan": {"config"}, "ui": set[str]()}
NO_LIBRARY = {
    "config": {"torch", "numpy", "transformers"},
    "plan": {"torch", "transformers"},
    "text": {"torch", "transformers", "jinja2"},
    "ops": {"fastapi", "safetensors", "transformers"},
    "model": {"fastapi", "safetensors", "transformers"},
    "ui": {"torch", "transformers"},
}
NOWHERE = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "jinja2", "transformers", "yaml", "joblib"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save",
                "yaml.load", "np.load", "numpy.load", "subprocess.getoutput", "torch.hub.load"}  # fmt: skip
BANNED_WORDS = {"trust_remote_code", "allow_pickle"}


def room_of(path: Path) -> str:
    """`hadal/ops/rope.py` -> `ops`; `hadal/config.py` -> `config`; a room's program stands above the
    floors."""
    if path.name == "__main__.py":
        return "__main__"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Every module that a source names in an import, absolute, with its line. `package`: where it lies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            # `from hadal import x` and `from .. import x` name a module in their list.
            for alias in node.names:
                yield node.lineno, ".".join([*module, alias.name] if module == ["hadal"] else module)


def violations(source: str, path: Path) -> list[str]:
    """All that `source`, lying at `path` in the package, does against the rules of this file."""
    tree, room = ast.parse(source), room_of(path)
    package = ["hadal", *path.relative_to(PACKAGE).parts[:-1]]
    found: list[str] = []
    for line, module in imported(tree, package):
        top, *rest = module.split(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        if top in NOWHERE or top in NO_LIBRARY.get(room, ()):
            found.append(f"{where}: {room} must not import {top}")
        if top != "hadal" or not rest or rest[0] == room or rest[0] not in FLOOR or room not in FLOOR:
            continue
        drawn = any(f"{module}.".startswith(f"{target}.") for target in ARROWS.get(room, ()))
        if FLOOR[rest[0]] >= FLOOR[room] and not drawn:
            found.append(f"{where}: {room} (floor {FLOOR[room]}) imports {rest[0]} (floor {FLOOR[rest[0]]})")
        elif room in ONLY_ROOMS and rest[0] not in ONLY_ROOMS[room]:
            found.append(f"{where}: {room} must not know {rest[0]}")
    for node in ast.walk(tree):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in BANNED_CALLS:
            found.append(f"{where}: calls {ast.unparse(node.func)}")
        if isinstance(node, ast.keyword) and (
            node.arg in BANNED_WORDS
            or (node.arg == "shell" and isinstance(node.value, ast.Constant) and node.value.value)
        ):
            found.append(f"{where}: passes {node.arg}")
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
        if name in BANNED_WORDS:
            found.append(f"{where}: uses {name}")
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_in_the_plan() -> None:
    rooms = {room_of(path) for path in SOURCES} - {"__init__", "__main__"}
    assert rooms <= FLOOR.keys(), f"rooms without a floor: {sorted(rooms - FLOOR.keys())}"


@pytest.mark.parametrize("room", sorted({room_of(path) for path in SOURCES}))
def test_room_keeps_to_the_plan(room: str) -> None:
    mine = [path for path in SOURCES if room_of(path) == room]
    found = [v for path in mine for v in violations(path.read_text("utf-8"), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "source", "complaint"),
    [
        ("text/x.py", "import torch", "text must not import torch"),
        ("ops/x.py", "from hadal.engine import Engine", "ops (floor 1) imports engine"),
        ("serve/x.py", "from hadal import evals", "serve (floor 5) imports evals"),
        ("post/x.py", "from hadal.evals import samples", "post (floor 5) imports evals"),
        ("evals/x.py", "from hadal.serve import app", "evals (floor 5) imports serve"),
        ("evals/x.py", "from hadal.post.grpo import run", "evals (floor 5) imports post"),
        ("engine/x.py", "from ..train import trainer", "engine (floor 4) imports train"),
        ("plan/x.py", "def f():\n    from hadal.text import templates", "plan (floor 1) imports text"),
        ("ui/x.py", "import hadal.serve", "ui must not know serve"),
        ("config.py", "import numpy as np", "config must not import numpy"),
        ("weights/x.py", "import pickle", "weights must not import pickle"),
        ("weights/x.py", "torch.load(p)", "calls torch.load"),
        ("evals/x.py", "eval('1')", "calls eval"),
        ("cli/x.py", "import os\nos.system('ls')", "calls os.system"),
        ("cli/x.py", "subprocess.run('ls', shell=True)", "passes shell"),
        ("weights/x.py", "f(trust_remote_code=False)", "passes trust_remote_code"),
        ("weights/x.py", "def f(trust_remote_code): ...", "uses trust_remote_code"),
    ],
)
def test_the_guard_sees(place: str, source: str, complaint: str) -> None:
    found = violations(source, PACKAGE / place)
    assert any(complaint in v for v in found), found


def test_the_guard_lets_through_what_is_allowed() -> None:
    source = "import torch, re\nfrom hadal.ops import rope\nfrom . import mla\nmodel.eval()\nre.compile('a')"
    assert violations(source, PACKAGE / "model" / "x.py") == []
    assert violations("from hadal.post.rewards import read", PACKAGE / "evals" / "x.py") == []


def test_import_hadal_is_instant_and_loads_nothing() -> None:
    code = "import sys, hadal; print([m for m in ('torch', 'numpy', 'fastapi', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_package_says_what_it_does_not_export() -> None:
    import hadal

    with pytest.raises(AttributeError, match="it exports"):
        hadal.Enigne  # noqa: B018
    assert set(hadal.__all__) >= {"Engine", "SamplingParams", "ModelConfig"}

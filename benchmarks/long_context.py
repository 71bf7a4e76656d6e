"""Context extension, before and after: the needle grid of one small model in six states.

    python benchmarks/long_context.py --out runs/long-context-study [--seed 1] [--minutes 8]
    python benchmarks/long_context.py --out runs/long-context-study --require-exact 0.5
    python benchmarks/long_context.py --out runs/long-context-study --draw          (pictures from the JSON)

    base            the main pre-training of recipes/long-context.toml, at its first length
    base + YaRN     the same weights with the phases' rope_scaling put into config.json, untrained
    each phase      trained under YaRN (DeepSeek-V3 report §4.3)
    no YaRN         the same phases from the same checkpoint without rope_scaling, after each as well

What is there already is kept: the same line again goes on where it stopped (`--minutes` stops training in
time for a machine that is lent by the ten minutes). Where the main part has not learnt to find one needle at
its own length, grids are red whatever follows: training prints what it finds in held-out documents, and
`--require-exact` stops there. Results: OUT/needle.json, OUT/needle.png where matplotlib
is installed, and each grid on the terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hadal.evals import needle
from hadal.train import recipe as recipes
from hadal.train.main import train
from hadal.train.recipe import Recipe
from hadal.train.runs import read

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "long-context.toml"


class NotLearnt(Exception):
    """The main part does not find enough needles of its own length."""


def train_all(recipe: Recipe, out: Path, device: str, until: float, require: float) -> bool:
    """The base, and its two continuations from the same checkpoint. False where time ran out. Raises
    NotLearnt where the base finds less than the share `require` of held-out needles."""
    data = dataclasses.replace(recipe.data, path=str(out / "data"))
    plain = tuple(dataclasses.replace(phase, rope_scaling={}) for phase in recipe.phases)
    for name, phases in (("base", ()), ("yarn", recipe.phases), ("no-yarn", plain)):
        folder = out / name
        if name == "yarn" and found_by(out / "base") < require:
            raise NotLearnt(
                f"the main part finds {found_by(out / 'base'):.1%} of held-out needles, --require-exact is "
                f"{require:.1%}: train longer, or at another rate, into another --out (see {out / 'base'})"
            )
        if name != "base" and not folder.exists():
            temporary = out / f".{name}"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(out / "base", temporary)
            temporary.rename(folder)
        left = (until - time.perf_counter()) / 60
        if left < 0.1:
            return False
        limits = dataclasses.replace(recipe.train, max_minutes=left)
        asked = dataclasses.replace(recipe, data=data, train=limits, phases=phases)
        written = out / f"{name}.json"
        written.write_text(json.dumps(asked.to_dict(), indent=1) + "\n", encoding="utf-8")
        if finished(folder, asked.steps):
            continue
        if not train(written, resume=True, out=folder, device=device).finished:
            return False
    return True


def found_by(folder: Path) -> float:
    """The share of held-out documents with one needle that the run in `folder` answers to the letter at its
    end; a share of all held-out documents where they are of another kind."""
    last = read(folder).kind("heldout")[-1]
    return float(last["domains"].get("one", last)["exact"])


def history(folder: Path) -> list[dict[str, float]]:
    """Shares of held-out documents without a fault, by form, through the run in `folder`."""
    return [
        {"step": event["step"], **{name: score["exact"] for name, score in event["domains"].items()}}
        for event in read(folder).kind("heldout")
    ]


def finished(folder: Path, steps: int) -> bool:
    """Whether the run in `folder` ended at its last step."""
    if not (folder / "metrics.jsonl").is_file():
        return False
    run = read(folder)
    return run.state == "finished" and run.kind("stop")[-1]["step"] == steps


def with_rope(folder: Path, target: Path, scaling: dict[str, Any]) -> Path:
    """A copy of an export whose config.json asks for another rotary embedding."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    (target / "manifest.json").unlink()  # it knows the sizes of the files that were copied
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["rope_scaling"] = scaling
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return target


def states(recipe: Recipe, out: Path) -> list[tuple[str, str, Path]]:
    """(key, title, folder) of every model that is examined."""
    base, first, last = out / "base" / "export", recipe.phases[0], recipe.phases[-1]
    context = needle.short(recipe.train.context)
    found = [("base", f"before: trained at {context}", base)]
    if first.rope_scaling:
        scaled = with_rope(base, out / "base-with-yarn", dict(first.rope_scaling))
        found.append(("base-yarn", f"before, YaRN switched on without training ({context})", scaled))
    for phase in recipe.phases[:-1]:
        title = f"after {needle.short(phase.context)} under YaRN"
        found.append((f"yarn-{phase.name}", title, out / "yarn" / f"export-{phase.name}"))
    reached = needle.short(last.context)
    found.append((f"yarn-{last.name}", f"after {reached} under YaRN", out / "yarn" / "export"))
    for phase in recipe.phases[:-1]:
        title = f"the same phases to {needle.short(phase.context)} without YaRN"
        found.append((f"no-yarn-{phase.name}", title, out / "no-yarn" / f"export-{phase.name}"))
    found.append(("no-yarn", f"the same phases to {reached} without YaRN", out / "no-yarn" / "export"))
    return found


def examine(
    folder: Path, title: str, lengths: list[int], samples: int, depths: int, seed: int, device: str
) -> needle.Grid:
    """The grid of one model."""
    from hadal.engine import Engine

    engine = Engine.load(folder, device=device, max_num_seqs=32, cuda_graphs=False, speculation="off")
    grid = needle.evaluate(
        engine,
        lengths=lengths,
        depths=[round(100 * i / (depths - 1)) for i in range(depths)],
        samples=samples,
        seed=seed,
        title=title,
        settings={"device": str(engine.device), "dtype": str(engine.dtype)},
    )
    del engine
    return grid


def main() -> int:
    """0: finished; 3: time ran out, give the same line again; 4: the main part has not learnt enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/long-context-study"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--from", type=int, default=256, dest="first", help="the shortest length of the grid")
    parser.add_argument("--to", type=int, default=0, help="the longest; default: the last phase's context")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so long")
    parser.add_argument("--require-exact", type=float, default=0.0, help="of the main part; see above")
    parser.add_argument("--draw", action="store_true", help="only draw OUT/needle.json")
    args = parser.parse_args()
    out, result = args.out, args.out / "needle.json"
    known: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    if args.draw:
        print(needle.draw(list(known["grids"].values()), out / "needle.png"))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + 60 * args.minutes
    recipe = recipes.load(args.recipe, [*args.overrides, f"run.seed={args.seed}"])
    try:
        if not train_all(recipe, out, args.device, until, args.require_exact):
            print("time ran out while training: give the same line again")
            return 3
    except NotLearnt as error:
        print(error)
        return 4
    lengths = needle.powers(args.first, args.to or recipe.phases[-1].context)
    known = {"recipe": recipe.to_dict(), "grids": {}, "seconds": {}} | known
    for key, title, folder in states(recipe, out):
        if key not in known["grids"]:
            if time.perf_counter() > until:
                print("time ran out before all grids: give the same line again")
                return 3
            known["grids"][key] = examine(
                folder, title, lengths, args.samples, args.depths, args.seed, args.device
            )
            known["seconds"] |= {name: seconds(out / name) for name in ("base", "yarn", "no-yarn")}
            known["heldout"] = {name: history(out / name) for name in ("base", "yarn", "no-yarn")}
            result.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(f"\n{title}")
        print("\n".join(needle.heat_lines(known["grids"][key], colour=False)))
    try:
        print(needle.draw(list(known["grids"].values()), out / "needle.png"))
    except ValueError as error:
        print(f"no picture here ({error}); --draw makes it from {result}")
    return 0


def seconds(folder: Path) -> float:
    """How long the run in `folder` trained in all."""
    return float(read(folder).kind("stop")[-1]["seconds"])


if __name__ == "__main__":
    sys.exit(main())

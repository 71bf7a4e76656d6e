"""`hadal r1 RECIPE`: the stages of DeepSeek-R1 (report §2.3, §2.4), one after another, resumable at any.

    OUT/NAME/               a stage's own folder: NAME.jsonl where it makes data, export/ where it makes a
                            model, both with a card; beside them what its kind leaves (metrics.jsonl …)
    OUT/NAME/measured.json  what its model can do (hadal/post/r1_measure.py)
    OUT/manifest.json       for each stage: what it was made of, by digests, and what came out
    OUT/README.md           the table of stages

Calls with --stage may work at different stages of a folder at the same time.

A stage is done again when its section of the recipe, or what it is made of, has changed; the plan says so
before anything starts. A stage that comes out as it was leaves those behind it alone. What was stopped goes
on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hadal.post import r1_card, r1_stages
from hadal.post.r1_recipe import R1Recipe, RecipeError, Stage, load, plain

VERSION = 1  # of what stages make; a change makes all anew
MANIFEST = "manifest.json"
ASKED = "asked to do it again"


@dataclass(frozen=True)
class Step:
    """A line of the plan. does: "keep", "measure" (made already), "run", "resume", "perhaps" (if what it is
    made of comes out otherwise); why: in words."""

    stage: Stage
    does: str
    why: str
    cost: r1_stages.Cost


@dataclass(frozen=True)
class Outcome:
    """How a call ended. reason: "finished", or "signal", which the same command goes on from."""

    reason: str
    folder: Path
    ran: tuple[str, ...]
    stages: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        return self.reason == "finished"


def r1(
    recipe_path: Path | str,
    *,
    stages: Sequence[str] = (),
    again: bool = False,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Outcome:
    """Go through a recipe's stages, or through those named in `stages` alone. `again`: even if they are done.

    Raises RecipeError, and what the stages raise.
    """
    run = Run(load(Path(recipe_path), overrides), out, device, console)
    return run.go(run.plan(stages, again))


def plan(
    recipe_path: Path | str,
    *,
    stages: Sequence[str] = (),
    again: bool = False,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
) -> tuple[Path, list[Step]]:
    """(the run's folder, what a call would do). Raises RecipeError."""
    run = Run(load(Path(recipe_path), overrides), out, "auto", Console(quiet=True))
    return run.folder, run.plan(stages, again)


class Run:
    """A recipe and its folder."""

    def __init__(
        self, recipe: R1Recipe, out: Path | str | None, device: str, console: Console | None
    ) -> None:
        self.recipe, self.device = recipe, device
        self.console = console or Console(stderr=True)
        self.folder = Path(out) if out is not None else Path("runs") / recipe.run.name
        self.manifest = read_manifest(self.folder)

    # --- deciding ---
    def place(self, name: str) -> Path:
        """The folder of a stage."""
        return self.folder / name

    def made(self, stage: Stage) -> Path:
        """What "@NAME" stands for."""
        folder = self.place(stage.name)
        return folder / "export" if stage.makes_model else folder / f"{stage.name}.jsonl"

    def material(self, stage: Stage) -> dict[str, Any]:
        """What a stage's result follows from: its section, digests of the stages and files that it names."""
        inputs = {name: self._digest(name) for name in stage.inputs}
        files = r1_stages.files_of(stage, self.recipe.beside)
        section = json.loads(json.dumps(plain(stage.recipe)))
        return {"version": VERSION, "section": section, "preference": stage.table.get("preference", ""),
                "inputs": inputs, "files": files}  # fmt: skip

    def _digest(self, name: str) -> str:
        return str(self.manifest.get(name, {}).get("digest", ""))

    def state(self, stage: Stage) -> tuple[str, str]:
        """(does, why) of a stage, what it is made of being as it is now."""
        entry, now = self.manifest.get(stage.name), self.material(stage)
        if entry is None:
            return "run", "not made yet"
        changed = differences(entry["material"], now)
        if changed:
            return "run", f"changed: {', '.join(changed[:4])}" + (" …" if len(changed) > 4 else "")
        if not entry["finished"]:
            return "resume", "was stopped"
        if not self.made(stage).exists():
            return "run", f"{self.made(stage)} is gone"
        if r1_stages.digest(self.made(stage)) != entry["digest"]:
            return "run", f"{self.made(stage)} is not what was written"
        if entry.get("measured_by", "") != self._measured_by(stage):
            return "measure", "[measure] has changed" if entry.get("measured_by") else "not measured yet"
        return "keep", "done"

    def _measured_by(self, stage: Stage) -> str:
        if not r1_stages.is_measured(stage):
            return ""
        return fingerprint({"measure": plain(self.recipe.measure), "model": self._digest(stage.name)})

    def plan(self, only: Sequence[str] = (), again: bool = False) -> list[Step]:
        """What is to be done, in order. Raises RecipeError for `only` whose inputs are not there."""
        wanted = [self.recipe.stage(name).name for name in only]
        if again and not wanted:
            raise RecipeError("--again is for --stage NAME; to begin anew, choose another --out")
        steps: list[Step] = []
        unsure: dict[str, str] = {}
        missing: set[str] = set()
        for stage in self.recipe.stages:
            if wanted and stage.name not in wanted:
                continue
            does, why = self.state(stage)
            before = [name for name in stage.inputs if name in unsure]
            if again and does in ("keep", "measure", "resume"):
                does, why = "run", ASKED
            elif does in ("keep", "measure") and before:
                does, why = "perhaps", f"if {', '.join(before)} comes out otherwise"
            if does in ("run", "resume", "perhaps"):
                unsure[stage.name] = does
                missing |= self._missing(stage, unsure)
            steps.append(Step(stage, does, why, self._cost(stage, does)))
        if missing:
            names = [stage.name for stage in self.recipe.stages if stage.name in missing]
            raise RecipeError(
                f"--stage {', '.join(wanted)} is made of what is not there as the recipe has it: "
                f"{', '.join(names)}; add --stage {' --stage '.join(names)}, or leave --stage out"
            )
        return steps

    def _missing(self, stage: Stage, coming: Mapping[str, str]) -> set[str]:
        """All that must be made before a stage, back to the first link, and is not coming."""
        names: set[str] = set()
        for name in stage.inputs:
            before = self.recipe.stage(name)
            if name not in coming and self.state(before)[0] not in ("keep", "measure"):
                names |= {name} | self._missing(before, coming)
        return names

    def _cost(self, stage: Stage, does: str) -> r1_stages.Cost:
        before = self.manifest.get(stage.name, {})
        same = does != "run" or before.get("material") == self.material(stage)
        entry = before if same else {}
        done = [e for e in self.manifest.values() if e.get("finished")]
        return r1_stages.cost(stage, self.recipe, entry, done, self.made)

    # --- doing ---
    def go(self, steps: Sequence[Step]) -> Outcome:
        """Carry out a plan, told first."""
        self._tell_plan(steps)
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError(f"{self.folder} is a file; --out takes the folder of the run")
        self.folder.mkdir(parents=True, exist_ok=True)
        ran: list[str] = []
        for step in steps:
            stage = step.stage
            self.manifest = read_manifest(self.folder)  # another call may have worked there
            does, why = (step.does, step.why) if step.why == ASKED else self.state(stage)
            if does == "keep":
                if step.does == "perhaps":
                    self.say(f"{stage.name}: kept, since what it is made of came out as it was")
                elif step.does != "keep":
                    self.say(f"{stage.name}: kept, another call has made it")
                continue
            if does in ("run", "resume"):
                ran.append(stage.name)
                if not self._make(stage, does == "resume", why):
                    self.say(f"stopped in {stage.name}; the same command goes on there")
                    return Outcome("signal", self.folder, tuple(ran), self.manifest)
            self._measure(stage)
            self._write_cards()
        self._write_cards()
        return Outcome("finished", self.folder, tuple(ran), self.manifest)

    def _tell_plan(self, steps: Sequence[Step]) -> None:
        busy = [step for step in steps if step.does != "keep"]
        self.say(f"{self.recipe.run.name}: {len(steps)} stages, {len(busy)} to do; {self.folder}")
        for step in steps:
            self.say(f"  {step.stage.name:<18} {step.does:<8} {step.why}; {step.cost.text()}")

    def _make(self, stage: Stage, resume: bool, why: str) -> bool:
        """Make a stage; whether it was finished."""
        folder, material = self.place(stage.name), self.material(stage)
        if not resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        before = float(self.manifest.get(stage.name, {}).get("seconds", 0.0)) if resume else 0.0
        entry: dict[str, Any] = {"kind": stage.kind, "title": stage.title, "material": material,
                                 "finished": False, "digest": "", "seconds": before}  # fmt: skip
        self._note(stage.name, entry)
        self.say(f"{stage.name}: {stage.title or stage.kind} ({why})")
        begun = time.perf_counter()
        places = {name: str(self.made(self.recipe.stage(name))) for name in stage.inputs}
        job = r1_stages.Job(
            stage, self.recipe, folder, self.made(stage), places,
            {name: self._digest(name) for name in stage.inputs}, resume, self.device, self.console,
        )  # fmt: skip
        try:
            made = r1_stages.MAKERS[stage.kind](job)
        finally:
            self._note(stage.name, entry | {"seconds": before + time.perf_counter() - begun})
        seconds = before + time.perf_counter() - begun
        done = {"finished": made.finished, "seconds": seconds, "facts": made.facts}
        if made.finished:
            done["digest"] = r1_stages.digest(self.made(stage))
        self._note(stage.name, entry | done)
        return made.finished

    def _measure(self, stage: Stage) -> None:
        if not r1_stages.is_measured(stage):
            return
        found = r1_stages.measured(self.made(stage), self.recipe.measure, self.device)
        path = self.place(stage.name) / "measured.json"
        write_json(path, found)
        entry = self.manifest[stage.name]
        self._note(stage.name, entry | {"measured_by": self._measured_by(stage), "measured": found})
        self.say(f"{stage.name}: {r1_card.line(found)}")

    def _note(self, name: str, entry: Mapping[str, Any]) -> None:
        """Put a stage into the manifest, whole or not at all; stages that the recipe has not are left out.
        What another call has put there meanwhile stays."""
        with alone(self.folder):
            found = {**read_manifest(self.folder), name: dict(entry)}
            ordered = [stage.name for stage in self.recipe.stages if stage.name in found]
            self.manifest = {key: found[key] for key in ordered}
            write_json(self.folder / MANIFEST, {"recipe": self.recipe.run.name, "stages": self.manifest})

    def _write_cards(self) -> None:
        with alone(self.folder):
            self.manifest = read_manifest(self.folder)
            r1_card.write(self.recipe, self.manifest, self.folder, self.made)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


# --- the manifest ---
@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While the manifest and the cards are written: other calls, which may work at other stages, wait."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_manifest(folder: Path) -> dict[str, Any]:
    """The stages of a run; none where there is no run. Raises RecipeError for a file that is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {name: dict(entry) for name, entry in stages.items() if entry["material"] is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} is no manifest of stages ({error}); choose another --out") from None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def fingerprint(value: Any) -> str:
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted places in which two plain values differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found: list[str] = []
        for key in dict.fromkeys([*before, *now]):
            inner = f"{path}.{key}" if path else str(key)
            missing = key not in before or key not in now
            found += [inner] if missing else differences(before[key], now[key], inner)
        return [one.removeprefix("section.") for one in found]
    return [] if before == now else [path]

"""`hadal probe`: a study of what models represent, from a recipe to a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError, human_seconds, is_terminal, note, print_json, say

if TYPE_CHECKING:
    from hadal.probe.backends import Estimate
    from hadal.probe.material import Gathered
    from hadal.probe.outcome import Maker, StudyOutcome
    from hadal.probe.recipe import Model, StudyRecipe

LARGE_REQUESTS, LARGE_COST, LARGE_SECONDS = 500, 1.0, 600.0  # of a service: beyond any of them, it is asked

What = Annotated[
    str,
    typer.Argument(metavar="nsm|RECIPE", help="nsm: the study of semantic primes; or a TOML file."),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", metavar="MODEL", help=f"{o.MODEL_HELP} May be given again."),
]
Services = Annotated[
    list[str] | None,
    typer.Option(metavar="MODEL@URL", help="A model of a service, its address …/v1; may be given again."),
]
Simulate = Annotated[
    float | None,
    typer.Option(metavar="EFFECT", help="No model: made-up vectors with an effect of this size."),
]
Languages = Annotated[
    str | None, typer.Option(metavar="CODE[,CODE]", help="Of the data; default: all that there are.")
]
Data = Annotated[
    list[Path] | None,
    typer.Option(metavar="FOLDER", help="More files of the same kinds: a language of your own."),
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="N[,N]", help="0: the embedding, i: the output of block i; default: all."),
]
Primary = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Where along the depth the hypotheses are tested, fixed beforehand."),
]
Pool = Annotated[
    str | None,
    typer.Option(metavar="NAME[,NAME]", help="Poolings; the first is tested, the others told beside."),
]
Permutations = Annotated[int | None, typer.Option(min=19, metavar="N", help="Draws of each null.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Default: runs/probe-NAME.")]
EstimateOnly = Annotated[bool, typer.Option("--estimate", help="Say what it would take, and stop.")]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Ask a service for much, or download a model, without asking.")
]


def probe(
    what: What,
    model: Models = None,
    backend: Services = None,
    simulate: Simulate = None,
    language: Languages = None,
    data: Data = None,
    layers: Layers = None,
    primary: Primary = None,
    pool: Pool = None,
    permutations: Permutations = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same results.json.")] = None,
    override: o.Overrides = None,
    out: Out = None,
    estimate: EstimateOnly = False,
    api_key: o.ApiKey = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    yes: Yes = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Study what models represent: categories, squares, isotopies.

    Embeds words in sentences, tests hypotheses against their nulls, a network of random weights and plain
    counts of words, and writes one report that needs nothing else. What it says of a simulation, it calls
    that.

    Examples:
        hadal probe nsm
        hadal probe nsm -m qwen2.5-1.5b --language fr --out runs/qwen-nsm
        hadal probe nsm --simulate 0.5
        hadal probe nsm --backend text-embedding@https://service.example/v1 --estimate
        hadal probe recipes/probe/colours.toml
    """
    from hadal.probe import study
    from hadal.probe.material import gather

    inference = o.Inference(device, dtype, quantize)
    changes = {"language": language, "data": data, "layers": layers, "primary": primary, "pool": pool}
    changes |= {"permutations": permutations, "seed": seed}
    recipe = _recipe(what, override or [], _models(model, backend, simulate, inference), changes)
    gathered = gather(recipe.data, recipe.tests.hypotheses)
    makers = _makers(recipe, gathered, api_key, inference, (yes, force, json))
    if estimate:
        _tell_estimate(study.estimate(recipe, gathered, makers), json)
        return
    services = [maker for maker in makers if maker.model.url]
    _confirm(study.estimate(recipe, gathered, services), yes)
    begin, work = time.perf_counter(), time.process_time()
    quiet = (lambda text: None) if json else note
    outcome = study.run(recipe, gathered=gathered, found=makers, tell=quiet)
    folder = out or Path("runs") / f"probe-{recipe.name}"
    _give(outcome, folder, (time.perf_counter() - begin, time.process_time() - work), json)


def _models(
    names: list[str] | None, services: list[str] | None, effect: float | None, asked: o.Inference
) -> tuple[Model, ...]:
    """Models of the command line; none leaves those of the recipe."""
    from hadal.probe.recipe import Model

    found = [
        Model(name, device=asked.device, dtype=asked.dtype, quantize=asked.quantize or "")
        for name in names or []
    ]
    for service in services or []:
        name, at, url = service.partition("@")
        if not (name and at and url.startswith(("http://", "https://"))):
            raise CliError(
                f"--backend is MODEL@URL, such as mini@http://127.0.0.1:8000/v1, not {service!r}", 2
            )
        found.append(Model(name, url=url))
    if effect is not None:
        found.append(Model(simulate=effect))
    return tuple(found)


def _recipe(
    what: str, overrides: list[str], models: tuple[Model, ...], changes: dict[str, Any]
) -> StudyRecipe:
    """The recipe as the command line changes it."""
    from dataclasses import replace

    from hadal.data.strict import build
    from hadal.probe.recipe import StudyRecipe, load, nsm

    recipe = nsm(overrides) if what == "nsm" else load(Path(what), overrides)
    table = recipe.to_dict()
    sections: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
        "language": ("data", "languages", _words), "data": ("data", "folders", lambda v: [str(p) for p in v]),
        "layers": ("vectors", "layers", _numbers), "primary": ("vectors", "primary", float),
        "pool": ("vectors", "pooling", _words), "permutations": ("tests", "permutations", int),
    }  # fmt: skip
    for name, value in changes.items():
        if value is not None and name in sections:
            section, key, read = sections[name]
            table[section][key] = read(value)
    if changes["seed"] is not None:
        table["seed"] = changes["seed"]
    changed: StudyRecipe = build(StudyRecipe, table)
    return replace(changed, model=models) if models else changed


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",")]


def _numbers(value: str) -> list[int]:
    try:
        return [int(word) for word in value.split(",")]
    except ValueError:
        raise CliError(f"--layers is numbers with commas between, not {value!r}", 2) from None


def _makers(
    recipe: StudyRecipe, gathered: Gathered, api_key: str | None, asked: o.Inference,
    manner: tuple[bool, bool, bool],
) -> list[Maker]:  # fmt: skip
    from hadal.cli.loading import prepare_model
    from hadal.probe import study

    yes, force, _ = manner
    for model in recipe.model:
        if model.name and not model.url:
            prepare_model(model.name, asked, yes=yes, force=force)
    return study.makers(recipe, gathered, api_key)


def _tell_estimate(told: list[tuple[str, Estimate]], json: bool) -> None:
    from dataclasses import asdict

    if json:
        print_json([{"model": title} | asdict(found) for title, found in told])
        return
    for title, found in told:
        say(f"{title}: {_line(found)}")
        note(found.note)


def _line(found: Estimate) -> str:
    seconds = "time unknown" if found.seconds is None else human_seconds(found.seconds)
    cost = "" if found.cost is None else f", cost {found.cost:.4g}"
    return f"{found.texts:,} texts, {found.tokens:,} tokens, {found.requests:,} requests, {seconds}{cost}"


def _confirm(told: list[tuple[str, Estimate]], yes: bool) -> None:
    """A service is asked for much only when someone has said yes."""
    for title, found in told:
        much = found.requests > LARGE_REQUESTS or (found.cost or 0) > LARGE_COST
        if yes or not (much or (found.seconds or 0) > LARGE_SECONDS):
            continue
        line = f"{title}: {_line(found)}"
        if not is_terminal(sys.stdin):
            raise CliError(f"{line}; --yes goes on without asking")
        if not typer.confirm(f"{line}. Go on?"):
            raise typer.Exit(1)


def _give(outcome: StudyOutcome, folder: Path, seconds: tuple[float, float], json: bool) -> None:
    from datetime import UTC, datetime

    from hadal.probe.report import as_json, write
    from hadal.probe.verdicts import summary, verdicts

    run = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds[0]}
    report = write(outcome, folder, run | {"processor seconds": seconds[1]})
    found = verdicts(outcome)
    if json:
        print_json(as_json(outcome, found) | {"folder": folder, "report": report} | run)
        return
    if outcome.is_simulation:
        say("SIMULATION: made-up vectors, no model.")
    for verdict in found:
        say(f"{verdict.hypothesis}  {verdict.model}, {verdict.language}: {verdict.text}")
    say()
    say(summary(found))
    note(f"{report}, in {human_seconds(seconds[0])}")

"""Flags that several verbs share, each written once. Names are those that people know from other servers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hadal.cli.terminal import CliError

if TYPE_CHECKING:
    from hadal.engine import SamplingParams

PICTURES = (".png", ".svg")


def picture(path: Path | None) -> Path | None:
    """The value of --plot, once its ending is one that can be drawn; judged before any work is done."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{str(path)!r} must end in {' or '.join(PICTURES)}")
    return path


MODEL_HELP = "A name from `hadal list` or `hadal show`, ORG/REPO on the hub, or a folder."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as those in recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; may be given again."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]
RunFolder = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Of the run; default: runs/NAME.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="Of the weights while running: auto, float32, bfloat16.")]
Quantize = Annotated[
    Literal["fp8", "int8", "int4", "off"] | None,
    typer.Option(
        "--quantize",
        help="Keep the matrices in 8 or 4 bits while running: less memory, faster answers. A folder in "
        "integers stays so unless this is off.",
    ),
]
CacheDtype = Annotated[
    Literal["auto", "fp8"],
    typer.Option("--cache-dtype", help="fp8: the latent cache of MLA in 656 bytes a token instead of 1,152."),
]
Offload = Annotated[
    Literal["cpu", "disk"] | None,
    typer.Option("--offload", help="Keep the routed experts in host memory, or in the model's files."),
]
ExpertCache = Annotated[
    float | None,
    typer.Option(
        "--expert-cache-gb", min=0.0, metavar="GB", help="With --offload: memory for the hottest experts."
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len", min=16, metavar="N", help="Longest prompt and answer together, in tokens."
    ),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="Batch-invariant operations: the same bits in any batch, but slower."),
]
Speculation = Annotated[
    Literal["auto", "mtp", "ngram", "off"] | None,
    typer.Option(
        "--speculation",
        help="Draft tokens ahead and verify them in one step: mtp (the model's own module), ngram (from the "
        "text itself), or off. The answers are the same, or as likely.",
    ),
]
SpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "--speculative-tokens", min=1, max=8, metavar="N", help="Drafts a step; default: 1 (mtp), 3 (ngram)."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Try even where the model does not seem to fit.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Download a missing model without asking.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before the conversation.")]
Think = Annotated[
    bool | None,
    typer.Option("--think/--no-think", help="Reason first or not, for models that can choose."),
]
Fold = Annotated[bool, typer.Option("--fold", help="Print the reasoning as one line.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 takes the likeliest token each time. Default: what the model asks for."),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Sample from the likeliest tokens of this total mass.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=0, help="Sample from the K likeliest tokens; 0 is off.")
]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, metavar="N", help="Longest answer; default: to the context's end."),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="A running server (`hadal serve`) instead of loading the model here."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="HADAL_API_KEY", metavar="KEY", help="The server's key.", show_envvar=True
    ),
]


@dataclass(frozen=True)
class Inference:
    """How a model is to run: keywords of `Engine.load`. None leaves a choice to the engine."""

    device: str = "auto"
    dtype: str = "auto"
    quantize: Literal["fp8", "int8", "int4", "off"] | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float | None = None
    exact: bool = False
    speculation: Literal["auto", "mtp", "ngram", "off"] | None = None
    num_speculative_tokens: int | None = None
    speculation_forced_acceptance: float | None = None
    offload: Literal["cpu", "disk"] | None = None
    expert_cache_gb: float | None = None
    cache_dtype: Literal["auto", "fp8"] | None = None

    def keywords(self) -> dict[str, Any]:
        """What was asked for."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class Sampling:
    """What the user asked of sampling; None leaves it to the model's own generation_config.json."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    NUMBERS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")

    def given(self) -> dict[str, Any]:
        """The settings that were made."""
        return {name: getattr(self, name) for name in self.NUMBERS if getattr(self, name) is not None}

    def with_setting(self, name: str, text: str) -> Sampling:
        """A copy with `name` set from `text`; "default" unsets it. Refuses unknown names and values."""
        import difflib

        name = name.replace("-", "_")
        if name not in self.NUMBERS:
            close = difflib.get_close_matches(name, self.NUMBERS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(self.NUMBERS)}"
            raise CliError(f"no setting {name!r}{hint}", 2)
        whole = name in ("top_k", "max_tokens", "seed")
        try:
            value = None if text in ("default", "none", "") else int(text) if whole else float(text)
        except ValueError:
            kind = "a whole number" if whole else "a number"
            raise CliError(f"{name} is {kind} or 'default', not {text!r}", 2) from None
        changed = replace(self, **{name: value})  # type: ignore[arg-type]
        changed.params({})  # refuses a value out of bounds
        return changed

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        """For the engine: the user's settings over the model's. RequestError names a bad field."""
        from hadal.engine import SamplingParams

        return SamplingParams(**{**defaults, **self.given()})

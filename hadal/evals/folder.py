"""The folder of an evaluation: settings.json, samples.jsonl, results.json; and what is written down of a run.

settings.json is written first: a run that is taken up again must have the same. samples.jsonl has a line for
each completion as soon as it is there, with its verdict at the end; results.json comes last.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadal import __version__
from hadal.evals.samples import EvaluationError
from hadal.weights.hub import digest

if TYPE_CHECKING:
    from hadal.engine import Engine

SETTINGS, SAMPLES, RESULTS, ANSWERS = "settings.json", "samples.jsonl", "results.json", "answers.jsonl"
_LIBRARIES = ("torch", "numpy", "tokenizers", "lm-eval", "math-verify", "reasoning-gym")
_FREE = ("versions", "date")  # may differ between a run and its continuation


def versions() -> dict[str, str]:
    """Of Hadal, Python and the libraries that a result may depend on, as far as they are installed."""
    found = {"hadal": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def described(engine: Engine) -> dict[str, Any]:
    """What a model is and how it runs. digest: of the folder's files (`hadal list` shows it); revision: the
    hub's, of a download."""
    folder = engine.folder
    return {
        "model": engine.name,
        "digest": None if folder is None else digest(folder),
        "revision": folder.name if folder is not None and folder.parent.name == "snapshots" else None,
        "parameters": sum(tensor.numel() for tensor in engine.model.parameters()),
        "template": engine.template.name if engine.template is not None else None,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "exact": engine.exact,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Folder:
    """Where an evaluation is kept."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Raises EvaluationError where the folder holds another evaluation, or one that is not to be taken
        up."""
        self.path, self.settings = path, dict(settings)
        before = path / SETTINGS
        if before.exists():
            if not resume:
                raise EvaluationError(
                    f"{path} holds an evaluation; --resume takes it up, another --out leaves it alone"
                )
            _check_same(path, json.loads(before.read_text("utf-8")), self.settings)
        elif path.exists() and any(path.iterdir()):
            raise EvaluationError(f"{path} is not empty and holds no evaluation; give another --out")
        path.mkdir(parents=True, exist_ok=True)
        write_json(before, self.settings)

    @property
    def samples(self) -> Path:
        return self.path / SAMPLES

    @property
    def answers(self) -> Path:
        return self.path / ANSWERS

    def finish(self, report: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]) -> None:
        """Write the samples with their verdicts in the place of those without, and the results."""
        temporary = self.path / f".{SAMPLES}.new"
        with temporary.open("w", encoding="utf-8") as file:
            for one in samples:
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
        temporary.replace(self.samples)
        write_json(self.path / RESULTS, report)


def _check_same(path: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(after))
    for key in (*before, *(key for key in wanted if key not in before)):
        if key not in _FREE and before.get(key) != wanted.get(key):
            raise EvaluationError(
                f"{path} was begun with {key} {json.dumps(before.get(key))}, now it is "
                f"{json.dumps(wanted.get(key))}; ask the same again, or give another --out"
            )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)

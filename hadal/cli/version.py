"""`hadal version`: Hadal's version and those of the libraries that decide what it can do."""

from __future__ import annotations

import platform

from hadal import __version__
from hadal.cli.options import Json
from hadal.cli.terminal import fields, print_json

LIBRARIES = (
    "torch",
    "triton",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "llguidance",
    "fastapi",
    "starlette",
    "uvicorn",
    "gradio",
)


def versions() -> dict[str, str | None]:
    """Name and version of each library, None where it is not installed; none of them is imported."""
    from importlib import metadata

    found: dict[str, str | None] = {"hadal": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def version(json: Json = False) -> None:
    """Print the versions of Hadal and of the libraries under it.

    Examples:
        hadal version
        hadal version --json
    """
    found = versions()
    if json:
        print_json(found)
        return
    fields((name, value or "not installed") for name, value in found.items())

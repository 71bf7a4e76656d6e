"""`hadal list`: the models on this machine."""

from __future__ import annotations

import time

from hadal.cli import options as o
from hadal.cli.terminal import human_bytes, note, print_json, table


def list_models(json: o.Json = False) -> None:
    """List the models on this machine.

    The one on board, and those that were downloaded.

    Examples:
        hadal list
        hadal list --json
    """
    from hadal.weights import hub

    entries = hub.list_models()
    if json:
        print_json(
            [
                {
                    "name": e.name,
                    "path": str(e.path),
                    "size_bytes": e.size_bytes,
                    "modified": e.modified,
                    "digest": e.digest,
                }
                for e in entries
            ]
        )
        return
    rows = [(e.name, human_bytes(e.size_bytes), _day(e.modified), str(e.path)) for e in entries]
    table(("NAME", "SIZE", "CHANGED", "FOLDER"), rows, right=(1,))
    note("`hadal show` lists the models that can be downloaded, and which of them fit here.")


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment))

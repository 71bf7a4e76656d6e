"""The inside of the sandbox: started as a process of its own, gives up its rights, runs one program.

    python -P -S -s -B jail.py CONFIG

CONFIG is a JSON file: the program, its limits, whether to lock, the descriptor for the report. Modules of the
standard library that the program names are imported before the lock, for no file can be opened after it. The
report is one JSON object: {"status": "passed"}, or what ended the program. The standard library alone is
imported here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Imported late by the standard library itself.
_ENCODINGS = """ascii latin_1 cp1252 cp437 utf_8_sig utf_16 utf_16_le utf_16_be utf_32 utf_32_le utf_32_be
    unicode_escape raw_unicode_escape hex_codec base64_codec rot_13""".split()
_LATE = ("_strptime", "copy", "decimal", "heapq", "linecache", "locale", "traceback", "typing", "unicodedata",
         "weakref", *(f"encodings.{name}" for name in _ENCODINGS))  # fmt: skip
# They would do something when imported, or need what is not there.
_NOT = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "lib2to3", "test", "_bootlocale"}
# Events of sys.addaudithook that no program here may cause. `open` of a descriptor that is open is allowed.
_FORBIDDEN = ("os.", "socket.", "subprocess.", "ctypes.", "shutil.", "tempfile.", "glob.", "pty.", "fcntl.",
              "sqlite3.", "webbrowser.", "ftplib.", "http.", "smtplib.", "urllib.", "syslog.",
              "signal.pthread_kill", "resource.", "mmap.", "_thread.start_new_thread")  # fmt: skip
_MESSAGE = 300  # characters of an error that are told


def sibling(name: str) -> Any:
    """A module that lies beside this file; its folder stays off the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules_of(program: str) -> list[str]:
    """Dotted names that the program's import statements name, as far as they are of the standard library."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [n for n in dict.fromkeys(names) if n.partition(".")[0] in sys.stdlib_module_names - _NOT]


def bring_in(program: str) -> None:
    """Import what the program will want. A name that is no module is the program's own affair."""
    for name in (*_LATE, *modules_of(program)):
        try:
            importlib.import_module(name)
        except Exception:  # such as `collections.Counter`, which is a name in a module
            continue


def set_limits(config: dict[str, Any]) -> None:
    """Limits of the kernel on this process; none can be raised again."""
    memory, seconds = int(config["memory_mib"]) << 20, int(config["cpu_seconds"])
    wanted = {"RLIMIT_AS": memory, "RLIMIT_DATA": memory, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": 0,
              "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": 0}  # fmt: skip
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            try:
                resource.setrlimit(kind, (value, value))
            except (OSError, ValueError):  # macOS knows RLIMIT_AS and refuses it
                continue


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """The hook of sys.addaudithook: a first wall, with errors that name the cause."""
    of_a_path = event == "open" and not (arguments and isinstance(arguments[0], int))
    if of_a_path or (event.startswith(_FORBIDDEN) and event not in ("os.putenv", "os.unsetenv")):
        raise PermissionError(f"the sandbox forbids {event}")


class _Text(importlib.abc.InspectLoader):
    """A loader of one module, from its text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text


def run(program: str) -> dict[str, str]:
    """Run the program as `__main__`; what came of it."""
    spec = importlib.util.spec_from_loader("__main__", loader := _Text(program))
    assert spec
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = module
    try:
        loader.exec_module(module)
    except SystemExit as error:
        return {"status": "left", "detail": str(error.code)[:_MESSAGE]}
    except MemoryError:
        return {"status": "memory", "detail": "MemoryError"}
    except BaseException as error:
        try:
            said = f"{type(error).__name__}: {error}"
        except BaseException:
            said = type(error).__name__
        return {"status": "failed", "detail": said[:_MESSAGE]}
    return {"status": "passed", "detail": ""}


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lock = sibling("lock")
    lock.die_with_parent(config["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv = ["program.py"]
    program, report = config["program"], config["report"]
    set_limits(config)
    bring_in(program)
    if config["lock"]:
        lock_here(lock, report)
    if config["audit"]:
        sys.addaudithook(forbid)
    outcome = run(program)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        outcome = {"status": "failed", "detail": "its output could not be written"}
    os.write(report, json.dumps(outcome).encode())
    os._exit(0)


def lock_here(lock: Any, report: int) -> None:
    """Lock, or say why not and end: a program never runs with more rights than were asked for."""
    try:
        lock.lock("compute")
    except OSError as error:
        os.write(report, json.dumps({"status": "no lock", "detail": str(error)}).encode())
        os._exit(0)


if __name__ == "__main__":
    main()

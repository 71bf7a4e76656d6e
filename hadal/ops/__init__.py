"""Numerics, one file an operation: a torch reference, and its fast paths behind the same function."""

from __future__ import annotations


def paths() -> list[tuple[str, str, str]]:
    """(operation, path that inference takes on this machine, why), as `hadal doctor` prints them.

    Asks the very functions that choose the path. On CPU the C++ kernels are built if they are not yet.
    """
    from hadal.ops.report import report

    return report()

"""Raw files to documents: text, JSON lines, Parquet, plain or gzipped, in pieces that can be read beside one
another.

A piece is a file, or 64 MB of a plain JSONL file (the lines that begin there), or a row group of a Parquet
file. Which pieces there are depends on the files alone, so the number of workers changes nothing.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hadal.data.puzzle_source import BYTES, PIECE_DOCUMENTS, generator_digest
from hadal.data.recipe import Source
from hadal.data.strict import RecipeError

PIECE_BYTES = 64 << 20
_JSONL = (".jsonl", ".jsonl.gz", ".json.gz", ".ndjson")
_TEXT = (".txt", ".txt.gz", ".md", ".rst")
_FIELD = re.compile(r"\{(\w+)\}")


class DataError(ValueError):
    """Input that cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class InputFile:
    """A file of a source. label: its path as it is told, free of where the machine keeps it.

    Puzzles are in no file: the path is their task, bytes are about what they will be, the hash is of their
    generators.
    """

    path: str
    label: str
    kind: str  # text, jsonl, parquet, puzzles
    bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class Piece:
    """Part of a file, from `begin` to `end`: bytes of a plain JSONL file, one row group, puzzles; −1: all."""

    file: InputFile
    begin: int = 0
    end: int = -1


def input_files(source: Source, base: Path) -> list[InputFile]:
    """The files of a source, in order. Raises RecipeError where a path leads to none."""
    if source.puzzles:
        label = f"puzzles:{source.split}:{source.puzzles}:{source.documents}"
        return [InputFile(source.puzzles, label, "puzzles", BYTES * source.documents)]
    if source.hub:
        folder, labels = _hub_folder(source.hub), f"hub:{source.hub}/"
    else:
        folder, labels = base, ""
    files: dict[str, InputFile] = {}
    for pattern in source.paths or (".",):
        found = _matches(folder / Path(pattern).expanduser(), source.format)
        if not found:
            raise RecipeError(
                f"source {source.name!r}: {pattern!r} leads to no file that can be read in {folder}; "
                "name a file, a folder or a glob, and a format where the ending does not tell it"
            )
        for path, kind in found:
            label = labels + _label(path, folder)
            files[label] = InputFile(str(path), label, kind, path.stat().st_size)
    return list(files.values())


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        raise RecipeError(
            f"the hub data set {name!r} is not on this machine; "
            f"`hf download --repo-type dataset {name}` gets it"
        ) from None


def _label(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base.resolve())).as_posix()


def _matches(path: Path, wanted: str) -> list[tuple[Path, str]]:
    """Files with their kinds, sorted by path; hidden ones and kinds that are not known are passed over."""
    explicit = path.is_file()
    if explicit:
        candidates = [path]
    elif path.is_dir():
        candidates = [
            p for p in path.rglob("*") if not any(x.startswith(".") for x in p.relative_to(path).parts)
        ]
    else:
        candidates = [Path(p) for p in glob.glob(str(path), recursive=True)]
    found = []
    for p in sorted(p.resolve() for p in candidates if p.is_file()):
        kind = _kind(p) if wanted == "auto" else wanted
        if kind or explicit:
            found.append((p, kind or "text"))
    return found


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(_JSONL):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    return "text" if name.endswith(_TEXT) and name not in ("readme.md", "license.txt") else ""


def sha256_of(path: Path, tick: Callable[[int], None] = lambda done: None) -> str:
    """Of a file's bytes; `tick(n)` after each n bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            tick(len(block))
    return digest.hexdigest()


def digest_of(file: InputFile, tick: Callable[[int], None] = lambda done: None) -> str:
    """SHA-256 of what a file's documents are made from."""
    if file.kind != "puzzles":
        return sha256_of(Path(file.path), tick)
    tick(file.bytes)
    return generator_digest()


def pieces_of(file: InputFile) -> list[Piece]:
    """A file's pieces, in order."""
    if file.kind == "puzzles":
        count = file.bytes // BYTES
        return [
            Piece(file, first, min(first + PIECE_DOCUMENTS, count))
            for first in range(0, count, PIECE_DOCUMENTS)
        ]
    if file.kind == "parquet":
        return [Piece(file, g, g + 1) for g in range(_parquet(file.path).num_row_groups)]
    if file.kind == "jsonl" and not file.path.endswith(".gz"):
        return [
            Piece(file, begin, min(begin + PIECE_BYTES, file.bytes))
            for begin in range(0, max(1, file.bytes), PIECE_BYTES)
        ]
    return [Piece(file)]


@dataclass(frozen=True)
class Record:
    """id: unique in its source if the data keep their ids apart; text: None where a record has none, and
    `fault` says why."""

    id: str
    text: str | None
    fault: str = ""


def records(
    piece: Piece, text: str, id: str, tick: Callable[[int], None] = lambda done: None
) -> Iterator[Record]:
    """The documents of a piece; `text` and `id` as in a recipe's source. `tick(bytes)` as they are read."""
    if piece.file.kind == "text":
        data = _open(piece.file.path).read()
        tick(piece.file.bytes)
        yield Record(piece.file.label, data.decode("utf-8", "replace"))
        return
    rows = _parquet_rows(piece) if piece.file.kind == "parquet" else _json_rows(piece)
    told = 0
    for place, done, row in rows:
        yield _record(row, f"{piece.file.label}:{place}", text, id)
        if done - told > 1 << 18:
            tick(done - told)
            told = done
    tick(max(0, size_of(piece) - told))


def _record(row: Any, place: str, text: str, id: str) -> Record:
    if not isinstance(row, dict):
        return Record(place, None, "not a JSON object")
    name = row.get(id)
    name = place if name is None or isinstance(name, dict | list) else str(name)
    value: Any
    if "{" in text:
        missing = [f for f in _FIELD.findall(text) if not isinstance(row.get(f), str | int | float)]
        value = None if missing else _FIELD.sub(lambda m: str(row[m[1]]), text)
    else:
        value = row.get(text)
    if not isinstance(value, str):
        return Record(name, None, f"no text in {text!r}; fields: {', '.join(map(str, list(row)[:8]))}")
    return Record(name, value)


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _json_rows(piece: Piece) -> Iterator[tuple[str, int, Any]]:
    """(byte where the line begins, bytes of the file read so far, the value or None) for lines that begin in
    the piece."""
    with open(piece.file.path, "rb") as raw:
        packed = piece.file.path.endswith(".gz")
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
        at = piece.begin
        if at:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # the line that began before belongs to the piece before
        try:
            while (piece.end < 0 or at < piece.end) and (line := file.readline()):
                if line.strip():
                    yield str(at), raw.tell() if packed else at - piece.begin, _json(line)
                at += len(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{piece.file.path} is damaged: {error}; get it again") from None


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parquet(path: str) -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(f"{path}: Parquet needs pyarrow; `pip install 'hadal[data]'` gives it") from None
    return parquet.ParquetFile(path)


def _parquet_rows(piece: Piece) -> Iterator[tuple[str, int, Any]]:
    number = 0
    for batch in _parquet(piece.file.path).iter_batches(batch_size=512, row_groups=[piece.begin]):
        for row in batch.to_pylist():
            yield f"{piece.begin}:{number}", 0, row
            number += 1


def size_of(piece: Piece) -> int:
    """About how many bytes of its file a piece is."""
    if piece.file.kind == "puzzles":
        return BYTES * (piece.end - piece.begin)
    if piece.file.kind == "parquet":
        return piece.file.bytes // max(1, _parquet(piece.file.path).num_row_groups)
    return piece.end - piece.begin if piece.end > 0 else piece.file.bytes

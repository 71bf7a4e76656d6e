"""Files of vectors, which say who made them: Parquet, NPY with a JSON file beside it, JSONL with a header.

All three hold the same: the identity, ids, layers, targets, vectors, columns of the caller's, and a digest
over identity, ids and vectors. `read` gives back what `write` took, or an IdentityError: for a file whose
label and numbers do not agree, a simulation under another name, and vectors without a label.

Parquet has a row a text: id, span, the caller's columns, and `layer_N` of fixed-size lists of float32, so
that other tools read it as it is; identity and digest are in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from hadal.probe.extract import ProbeError
from hadal.probe.identity import Embeddings, IdentityError, identity_of

ENDINGS: Final = (".parquet", ".npy", ".jsonl")
_FORMAT: Final = "hadal embeddings 1"
Columns = Mapping[str, Sequence[Any]]


def write(path: str | Path, found: Embeddings, columns: Columns | None = None) -> Path:
    """Write the vectors, and `columns` beside them (a value a text: labels, texts), by the path's ending.
    Raises ProbeError for another ending, and for columns of another length or of a name that is taken."""
    path = ending(path)
    columns = columns or {}
    for name, values in columns.items():
        if len(values) != len(found) or name in ("id", "span") or name.startswith("layer_"):
            raise ProbeError(f"column {name!r} is taken, or has not one value for each of {len(found)} texts")
    writer = {".parquet": _write_parquet, ".npy": _write_npy, ".jsonl": _write_jsonl}[path.suffix]
    writer(path, found, columns)
    return path


def read(path: str | Path) -> Embeddings:
    """The vectors of a file. Raises ProbeError, or IdentityError as above."""
    return read_with_columns(path)[0]


def read_with_columns(path: str | Path) -> tuple[Embeddings, dict[str, list[Any]]]:
    """The vectors, and the columns that were written beside them."""
    path = ending(path)
    if not path.is_file():
        raise ProbeError(f"{path} does not exist")
    reader = {".parquet": _read_parquet, ".npy": _read_npy, ".jsonl": _read_jsonl}[path.suffix]
    try:
        return reader(path)
    except IdentityError as error:
        raise IdentityError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ProbeError):
            raise
        raise ProbeError(f"{path} is no file of embeddings that Hadal wrote ({error})") from error


def ending(path: str | Path) -> Path:
    """The path, if its ending is one of ours. Raises ProbeError."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ProbeError(f"{str(path)!r} must end in {', '.join(ENDINGS)}")
    return path


# --- what every form holds ---


def _head(found: Embeddings) -> dict[str, Any]:
    return {"format": _FORMAT, "identity": found.identity.to_json(), "digest": found.digest()}


def _built(head: Any, ids: Sequence[str], vectors: np.ndarray[Any, Any], spans: Sequence[str]) -> Embeddings:
    """Embeddings of what was read, once the digest agrees."""
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise IdentityError("nothing says who made these vectors: the identity is missing")
    identity = identity_of(head["identity"])
    values = np.array(vectors, np.float32)
    found = Embeddings(values, identity.layers, [str(i) for i in ids], identity, [str(s) for s in spans])
    if found.digest() != head["digest"]:
        raise IdentityError(
            "the digest does not belong to this identity and these vectors: the file was changed after it "
            "was written; make it again"
        )
    return found


# --- parquet ---


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ProbeError(
            "Parquet needs pyarrow: pip install 'hadal[data]', or write .npy or .jsonl"
        ) from error
    return pyarrow


def _write_parquet(path: Path, found: Embeddings, columns: Columns) -> None:
    arrow = _arrow()
    width = found.vectors.shape[2]
    data = {"id": arrow.array(found.ids, arrow.string())}
    if found.spans:
        data["span"] = arrow.array(found.spans, arrow.string())
    data |= {name: arrow.array(list(values)) for name, values in columns.items()}
    for layer in found.layers:
        flat = arrow.array(np.ascontiguousarray(found.at(layer)).ravel(), arrow.float32())
        data[f"layer_{layer}"] = arrow.FixedSizeListArray.from_arrays(flat, width)
    table = arrow.table(data).replace_schema_metadata({"hadal": json.dumps(_head(found))})
    arrow.parquet.write_table(table, path)


def _read_parquet(path: Path) -> tuple[Embeddings, dict[str, list[Any]]]:
    arrow = _arrow()
    try:
        table = arrow.parquet.read_table(path)
    except arrow.ArrowException as error:
        raise ProbeError(f"{path} is not readable as Parquet: {error}") from error
    head = json.loads((table.schema.metadata or {}).get(b"hadal", b"null"))
    layers = [name for name in table.column_names if name.startswith("layer_")]
    parts = []
    for name in layers:
        column = table.column(name).combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        parts.append(flat.reshape(len(column), column.type.list_size))
    if head is not None and layers != [f"layer_{n}" for n in head["identity"]["layers"]]:
        raise IdentityError(f"the identity speaks of layers {head['identity']['layers']}, not of {layers}")
    spans = table.column("span").to_pylist() if "span" in table.column_names else []
    found = _built(head, table.column("id").to_pylist(), np.stack(parts, 1), spans)
    rest = [name for name in table.column_names if name not in ("id", "span", *layers)]
    return found, {name: table.column(name).to_pylist() for name in rest}


# --- npy, with <file>.json beside it ---


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_npy(path: Path, found: Embeddings, columns: Columns) -> None:
    head = _head(found) | {"ids": found.ids, "spans": found.spans}
    head["columns"] = {name: list(values) for name, values in columns.items()}
    np.save(path, found.vectors)
    _beside(path).write_text(json.dumps(head, ensure_ascii=False) + "\n", "utf-8")


def _read_npy(path: Path) -> tuple[Embeddings, dict[str, list[Any]]]:
    if not _beside(path).is_file():
        raise IdentityError(f"{_beside(path).name} is missing, which says who made these vectors")
    head = json.loads(_beside(path).read_text("utf-8"))
    with path.open("rb") as file:
        vectors = np.lib.format.read_array(file)  # refuses objects
    return _built(head, head["ids"], vectors, head["spans"]), dict(head["columns"])


# --- jsonl ---


def lines(found: Embeddings, columns: Columns | None = None) -> list[str]:
    """A header line, then one a text: {"id", "span", columns…, "vectors": [layers × width]}."""
    spans = {"span": found.spans} if found.spans else {}
    rows = {"id": found.ids, **spans, **(columns or {}), "vectors": found.vectors.tolist()}
    texts = [
        json.dumps(dict(zip(rows, row, strict=True)), ensure_ascii=False)
        for row in zip(*rows.values(), strict=True)
    ]
    return [json.dumps(_head(found), ensure_ascii=False), *texts]


def _write_jsonl(path: Path, found: Embeddings, columns: Columns) -> None:
    path.write_text("\n".join(lines(found, columns)) + "\n", "utf-8")


def _read_jsonl(path: Path) -> tuple[Embeddings, dict[str, list[Any]]]:
    head, *rows = (json.loads(line) for line in path.read_text("utf-8").split("\n") if line)
    if not rows:
        raise ProbeError(f"{path} holds no vectors")
    if "format" not in head:
        raise IdentityError("the first line does not say who made these vectors")
    vectors = np.array([row["vectors"] for row in rows], np.float32)
    spans = [row["span"] for row in rows] if "span" in rows[0] else []
    names = [name for name in rows[0] if name not in ("id", "span", "vectors")]
    columns = {name: [row[name] for row in rows] for name in names}
    return _built(head, [row["id"] for row in rows], vectors, spans), columns

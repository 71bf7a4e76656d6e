"""The tasks of `hadal data prepare`: what a worker does with one part. Arguments and results are JSON.

A part is what one piece of a file became: its documents after the filters, one after the other.

    texts.bin  UTF-8, end to end         offsets.bin     int64 [N+1], bytes
    keys.bin   uint64 [N, 2], exact      signatures.bin  uint32 [N, P], MinHash
    names.json the documents' names      marks.bin       int32 [N], evaluation text that it holds, or −1
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hadal.data import contamination
from hadal.data.cleaning import language_of, normalise, quality_fault
from hadal.data.documents import Encoder
from hadal.data.duplicates import EXACT, NEAR, MinHash, exact_key, find_copies
from hadal.data.encoding import DocumentEncoder, Ids, draws
from hadal.data.mixing import Table, hash_order, make_plan
from hadal.data.puzzle_source import (
    BYTES,
    HELD_OUT,
    examination,
    leaks,
    load_exam,
    puzzle_texts,
    save_exam,
)
from hadal.data.reading import InputFile, Piece, records
from hadal.data.recipe import Decontaminate, Duplicates, Mixture, Quality
from hadal.data.report import Dropped
from hadal.data.shards import write_shard
from hadal.data.strict import build
from hadal.data.tasks import Tick
from hadal.data.words import Words
from hadal.text.tokenizer import Tokenizer

CONTAMINATED = 3
_DTYPE = {"offsets": "<i8", "keys": "<u8", "signatures": "<u4", "marks": "<i4", "lengths": "<u4",
          "bytes": "<u4", "order": "<u8", "heldout": "<u1", "fim": "<u1", "decision": "<i1"}  # fmt: skip


def load(folder: str | Path, name: str) -> Any:
    """An array of a part."""
    return np.fromfile(Path(folder) / f"{name}.bin", dtype=_DTYPE[name])


def _save(folder: Path, name: str, values: Any) -> None:
    np.asarray(values, dtype=_DTYPE[name]).tofile(folder / f"{name}.bin")


def _piece(spec: dict[str, Any]) -> Piece:
    return Piece(InputFile(**spec["file"]), spec["begin"], spec["end"])


def index_evaluations(folder: Path, spec: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """Evaluation sets to an index of their n-grams."""
    settings: Decontaminate = build(Decontaminate, spec["settings"])
    texts: list[tuple[str, str]] = []
    for piece in map(_piece, spec["pieces"]):
        for field in settings.fields if piece.file.kind != "text" else ("",):
            found = (r for r in records(piece, field, "id") if r.text)
            texts += [(f"{r.id} ({field})" if field else r.id, r.text or "") for r in found]
        tick(piece.file.bytes)
    if settings.puzzles:
        exam = examination(settings.puzzles)
        first = len(texts)
        texts += [(name, one.prompt) for name, one in exam]
        texts.append((HELD_OUT, ""))
        save_exam(folder, [one for _, one in exam], first, len(texts) - 1)
    index = contamination.build_index(texts, settings)
    contamination.save_index(index, folder)
    held = 1 if settings.puzzles else 0
    return {"texts": len(texts) - held, "ngrams": sum(len(grams) for grams, _ in index.tables.values())}


def read_puzzles(folder: Path, spec: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """Puzzles to a part, compared with the examination. They are read as they are: nothing is filtered."""
    piece, exam = _piece(spec["piece"]), load_exam(spec["index"])
    offsets, keys, marks = array("q", [0]), array("Q"), array("i")
    languages: dict[str, int] = {}
    talks = puzzle_texts(piece.file.path, spec["seed"], spec["split"], piece.begin, piece.end)
    with (folder / "texts.bin").open("wb") as texts:
        for number, (talk, text) in enumerate(talks):
            data = text.encode()
            texts.write(data)
            offsets.append(offsets[-1] + len(data))
            keys.extend(exact_key(text))
            marks.append(-1 if exam is None else exam.find(talk))
            language = talk.last.language
            languages[language] = languages.get(language, 0) + 1
            if number % 1000 == 999:
                tick(1000 * BYTES)
    for name, values in (("offsets", offsets), ("keys", keys), ("marks", marks), ("signatures", [])):
        _save(folder, name, values)
    names = [str(index) for index in range(piece.begin, piece.end)]
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")
    count, size = len(names), offsets[-1]
    return {"read": count, "read_bytes": size, "documents": count, "bytes": size, "languages": languages,
            "dropped": []}  # fmt: skip


def read_piece(folder: Path, spec: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """A piece of a file to a part: normalised, filtered, with all that later steps compare."""
    keep, rules = spec["keep"], Quality(**spec["quality"])
    words, minhash = Words(), MinHash(Duplicates(**spec["duplicates"]))
    index = contamination.load_index(Path(spec["index"])) if spec["index"] else None
    dropped = Dropped(spec["source"])
    names, offsets = [], array("q", [0])
    keys, marks = array("Q"), array("i")
    read = read_bytes = 0
    languages: dict[str, int] = {}
    with (folder / "texts.bin").open("wb") as texts, (folder / "signatures.bin").open("wb") as signatures:
        for record in records(_piece(spec["piece"]), spec["text"], spec["id"], tick):
            read += 1
            if record.text is None:
                dropped.add("read", "no text", record.id, record.fault, "")
                continue
            text = normalise(record.text)
            data = text.encode()
            read_bytes += len(data)
            language = language_of(text)
            languages[language] = languages.get(language, 0) + 1
            if keep and language not in keep:
                dropped.add("language", language, record.id, f"language {language}", text)
                continue
            if fault := quality_fault(text, rules):
                dropped.add("quality", fault[0], record.id, fault[1], text)
                continue
            names.append(record.id)
            texts.write(data)
            offsets.append(offsets[-1] + len(data))
            keys.extend(exact_key(text))
            mine = words.of(text) if minhash.count or index else None
            if minhash.count:
                signatures.write(minhash.signature(mine).astype("<u4").tobytes())  # type: ignore[arg-type]
            marks.append(index.find(mine) if index is not None and mine is not None else -1)
    for name, values in (("offsets", offsets), ("keys", keys), ("marks", marks)):
        _save(folder, name, values)
    (folder / "names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    return {
        "read": read, "read_bytes": read_bytes, "documents": len(names), "bytes": offsets[-1],
        "languages": languages, "dropped": dropped.to_list(),
    }  # fmt: skip


class PartTexts:
    """Texts and names of parts by a document's number in the whole."""

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts
        self.offsets = [load(part, "offsets") for part in parts]
        self.first = np.cumsum([0, *(len(o) - 1 for o in self.offsets)])
        self._names: dict[int, list[str]] = {}

    def _place(self, document: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.first, document, side="right")) - 1
        return part, document - int(self.first[part])

    def text(self, document: int) -> str:
        part, at = self._place(document)
        begin, end = map(int, self.offsets[part][at : at + 2])
        with (Path(self.parts[part]) / "texts.bin").open("rb") as file:
            file.seek(begin)
            return file.read(end - begin).decode()

    def name(self, document: int) -> str:
        part, at = self._place(document)
        if part not in self._names:
            self._names = {part: json.loads((Path(self.parts[part]) / "names.json").read_text("utf-8"))}
        return self._names[part][at]


def judge(folder: Path, spec: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """Of all documents, which go as copies or as contaminated: decision.bin, int8 by document."""
    parts, sources = spec["parts"], spec["sources"]
    settings = Duplicates(**spec["duplicates"])
    keys_N2 = np.concatenate([load(p, "keys") for p in parts]).reshape(-1, 2)
    signatures = np.concatenate([load(p, "signatures") for p in parts]).reshape(len(keys_N2), settings.hashes)
    found = find_copies(keys_N2, signatures, settings, tick)
    marks = np.concatenate([load(p, "marks") for p in parts])
    decision = found.decision.copy()
    decision[(decision == 0) & (marks >= 0)] = CONTAMINATED
    _save(folder, "decision", decision)
    texts = PartTexts(parts)
    index = contamination.load_index(Path(spec["index"])) if spec["index"] else None
    source_of = np.repeat(np.arange(len(parts)), np.diff(texts.first))
    dropped = {source: Dropped(source) for source in dict.fromkeys(sources)}
    shown: dict[tuple[str, int], int] = {}
    rules = {
        EXACT: ("exact", "exact copy"),
        NEAR: ("near", "near copy"),
        CONTAMINATED: ("contamination", "n-gram"),
    }
    for document in hash_order(keys_N2[:, 0], np.flatnonzero(decision)).tolist():
        code, source = int(decision[document]), sources[source_of[document]]
        size = int(np.diff(texts.offsets[source_of[document]])[document - texts.first[source_of[document]]])
        place, why, text = "", "", ""
        if shown.setdefault((source, code), 0) < Dropped.SAMPLES:
            shown[source, code] += 1
            place, text = texts.name(document), texts.text(document)
            if code == CONTAMINATED and index is not None:
                name, shared = index.names[marks[document]], index.shared(text)
                why = f"{name} has “{shared}”" if shared and name != HELD_OUT else f"asks {name}"
            else:
                original = int(found.original[document])
                stays = f"{sources[source_of[original]]}/{texts.name(original)}"
                why = f"{found.similarity[document]:.0%} like {stays}"
        dropped[source].add(*rules[code], place, why, text, size)
    return {"dropped": [entry for d in dropped.values() for entry in d.to_list()]}


Encode = Callable[[str, str, bool], tuple[Ids, bool]]
"""(text, name, whether it is held out) to its ids, and whether it was rearranged."""


def _text_encoder(spec: dict[str, Any]) -> Encode:
    tokenizer = Tokenizer.load(spec["tokenizer"])
    options = {"seed": spec["seed"], "bos": spec["bos"], "split_rate": spec["split_rate"]}
    train = DocumentEncoder(tokenizer, fim_rate=spec["fim_rate"], **options)
    heldout = DocumentEncoder(tokenizer, **options)
    return lambda text, name, aside: (heldout if aside else train).encode(text, name)


def _puzzle_encoder(spec: dict[str, Any]) -> Encode:
    """Their control tokens are their own; they are never rearranged: a middle without its steps teaches
    nothing."""
    encoder = Encoder(Path(spec["tokenizer"]))
    return lambda text, name, aside: (np.array(encoder.encode(text), dtype=np.uint32), False)


def tokenise(folder: Path, spec: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """The documents of a part that stay, as tokens: ids.bin, and length, size, order and side of each."""
    part, seed, source = Path(spec["part"]), spec["seed"], spec["source"]
    encode = _puzzle_encoder(spec) if spec["puzzles"] else _text_encoder(spec)
    decision = load(spec["judged"], "decision")[spec["first"] :]
    names, offsets = json.loads((part / "names.json").read_text("utf-8")), load(part, "offsets")
    keys = load(part, "keys").reshape(-1, 2)
    arrays: dict[str, list[int]] = {"lengths": [], "bytes": [], "order": [], "heldout": [], "fim": []}
    done = 0
    with (part / "texts.bin").open("rb") as texts, (folder / "ids.bin").open("wb") as ids:
        for at, name in enumerate(names):
            data = texts.read(int(offsets[at + 1] - offsets[at]))
            if decision[at]:
                continue
            key = f"{keys[at, 0]:x}{keys[at, 1]:x}"
            aside = not spec["puzzles"] and draws(seed, f"heldout|{key}", 1)[0] < spec["heldout"]
            encoded, fim = encode(data.decode(), f"{source}/{name}", aside)
            ids.write(encoded.astype("<u4").tobytes())
            arrays["lengths"].append(len(encoded))
            arrays["bytes"].append(len(data))
            arrays["order"].append(int(draws(seed, f"order|{source}/{name}|{key}", 1)[0] * 2**64))
            arrays["heldout"].append(aside)
            arrays["fim"].append(fim)
            if (done := done + len(data)) > 1 << 18:
                tick(done)
                done = 0
    for array_name, values in arrays.items():
        _save(folder, array_name, values)
    return {"documents": len(arrays["lengths"]), "tokens": sum(arrays["lengths"])}


def mix(folder: Path, spec: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """Which documents go where: plan.bin, int32 [M, 2] of (part, document in it), in their final order."""
    tables = [
        Table(*(load(p, name) for name in ("lengths", "bytes", "order", "heldout"))) for p in spec["parts"]
    ]
    plan = make_plan(tables, spec["sources"], spec["weights"], Mixture(**spec["mixture"]), spec["per_shard"])
    plan.places.astype("<i4").tofile(folder / "plan.bin")
    return {"shards": [asdict(s) for s in plan.shards], "sources": plan.sources, "heldout": plan.heldout}


def pack(folder: Path, spec: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """One shard of a plan."""
    places = np.fromfile(Path(spec["plan"]) / "plan.bin", dtype="<i4").reshape(-1, 2)[
        spec["begin"] : spec["end"]
    ]
    pieces = []
    lengths = np.empty(len(places), dtype=np.uint32)
    opened: dict[int, tuple[Any, Any, Any]] = {}
    flags = [load(part, "fim") for part in spec["parts"]]
    fim = sum(int(flags[part][at]) for part, at in places.tolist())
    for row, (part, at) in enumerate(places.tolist()):
        if part not in opened:
            size = load(spec["parts"][part], "lengths").astype(np.int64)
            ids = np.memmap(Path(spec["parts"][part]) / "ids.bin", dtype="<u4", mode="r")
            opened[part] = (ids, size, np.cumsum(size) - size)
        ids, size, start = opened[part]
        pieces.append(ids[start[at] : start[at] + size[at]])
        lengths[row] = size[at]
    tokens = np.concatenate(pieces).astype(spec["dtype"])
    made = write_shard(folder, spec["name"], (tokens, lengths))
    exam = load_exam(spec["exam"])
    left = leaks(tokens, exam, Encoder(Path(spec["tokenizer"]))) if exam else 0
    tick(len(tokens))
    return {"file": asdict(made), "fim": fim, "leaks": left}

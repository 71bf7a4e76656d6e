"""A published folder as data: configuration, shards, every tensor checked against the model (no torch).

`config.json`, then either `model.safetensors.index.json` with its shards or a single `model.safetensors`.
Everything that can be known without reading the data is checked here, by name: missing, extra, misshapen,
wrong dtype, doubled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hadal.config import ConfigError, ModelConfig, suggest
from hadal.weights.errors import WeightsError
from hadal.weights.header import MAX_HEADER_BYTES, MAX_TENSORS, Stored, read_header
from hadal.weights.manifest import check_sizes, read_manifest
from hadal.weights.names import (
    CODES_SUFFIX,
    SCALE_SUFFIX,
    Expected,
    Slot,
    expected_tensors,
    is_harmless,
    slots,
)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_CONFIG_BYTES = 1_000_000
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_ALLOWED = {
    "float": ("BF16", "F16", "F32"),
    "float32": ("F32",),
    "fp8": ("F8_E4M3",),
    "scale": ("F32",),
    "codes": ("I32",),
    "groups": ("BF16", "F16", "F32"),
    "shape": ("I64", "I32"),
}


@dataclass(frozen=True)
class Folder:
    """A checked folder: `stored` has exactly the names of `expected`, plus optional copies."""

    path: Path
    config: ModelConfig
    expected: dict[str, Expected]
    optional: dict[str, Slot]
    stored: dict[str, Stored]
    files: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that will be read."""
        return sum(s.nbytes for s in self.stored.values())


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a folder. WeightsError when there is none, ConfigError names the faulty key."""
    try:
        return ModelConfig.from_hf(read_config_json(folder))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """`config.json` as it stands."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; give a folder with {CONFIG} and *.safetensors")
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder} has no {CONFIG}; a model folder holds {CONFIG} and *.safetensors")
    return _read_json(folder / CONFIG, _MAX_CONFIG_BYTES)


def open_folder(folder: Path, *, with_mtp: bool = True) -> Folder:
    """Read configuration and headers of a folder, and check all names, shapes and dtypes.

    `with_mtp` False leaves the MTP modules out of what is expected, whether the folder has them or not.
    Raises WeightsError (naming tensor and file) or ConfigError.
    """
    config = read_config(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        check_sizes(folder, manifest)
    files, weight_map = _shards(folder)
    stored = _merge(folder, files, weight_map)
    packed = {n.removesuffix(CODES_SUFFIX) for n in stored if n.endswith(CODES_SUFFIX)}
    expected = expected_tensors(config, with_mtp=with_mtp, packed=packed)
    optional = {name: slot for name, slot in slots(config, with_mtp=with_mtp).items() if slot.optional}
    ignored = set() if with_mtp else set(expected_tensors(config, packed=packed)) - set(expected)
    _check_names(folder, config, expected, stored, ignored | set(optional))
    for name, wanted in expected.items():
        _check_tensor(config, name, wanted, stored[name])
    for name, slot in optional.items():
        if name in stored:
            _check_tensor(config, name, Expected(slot.shape, "float", slot), stored[name])
    kept = {name: stored[name] for name in (*expected, *optional) if name in stored}
    return Folder(folder, config, expected, optional, kept, files)


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        if path.stat().st_size > limit:
            raise WeightsError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _shards(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """The shard names of a folder and, with an index, which shard holds which tensor."""
    present = sorted(p.name for p in folder.glob("*.safetensors"))
    if not (folder / INDEX).is_file():
        if present == [SINGLE]:
            return present, None
        raise WeightsError(_no_weights(folder, present))
    weight_map = read_index(folder)
    files = sorted(set(weight_map.values()))
    for shard in files:
        if not (folder / shard).is_file():
            raise WeightsError(f"{folder / shard} is missing, {INDEX} names it; fetch the file")
    for shard in present:
        if shard not in files:
            raise WeightsError(
                f"{folder / shard} is not named by {INDEX}; remove the file, or fetch the right index"
            )
    return files, weight_map


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name → shard of `model.safetensors.index.json`; every shard is a plain file name."""
    weight_map = _read_json(folder / INDEX, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{folder / INDEX} has no weight_map; fetch the file again")
    if len(weight_map) > MAX_TENSORS:
        raise WeightsError(
            f"{folder / INDEX} lists {len(weight_map):,} tensors; at most {MAX_TENSORS:,} are read"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise WeightsError(
                f"{folder / INDEX} puts {name} into {shard!r}, which is not a plain *.safetensors name"
            )
    return weight_map


def _no_weights(folder: Path, present: list[str]) -> str:
    if present:
        return (
            f"{folder} has {len(present)} *.safetensors files ({present[0]}, …) but no {INDEX}; "
            "fetch the index"
        )
    other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".pkl"))
    if other:
        return (
            f"{folder} holds {other[0]}, no *.safetensors; pickle and other formats are never "
            "read, convert it first"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; is the download complete?"


def _merge(folder: Path, files: Iterable[str], weight_map: Mapping[str, str] | None) -> dict[str, Stored]:
    """All headers together; a tensor is in one shard, and in the one that the index says."""
    merged: dict[str, Stored] = {}
    for shard in files:
        for name, stored in read_header(folder / shard).items():
            if name in merged:
                raise WeightsError(
                    f"{name} is in both {merged[name].file.name} and {shard}; remove one of the files"
                )
            if weight_map is not None and weight_map.get(name) != shard:
                said = weight_map.get(name, "nowhere")
                raise WeightsError(
                    f"{name} is in {shard}, but {INDEX} says {said}; fetch index and shard again"
                )
            merged[name] = stored
    for name in weight_map or ():
        if name not in merged:
            raise WeightsError(
                f"{name} is missing from {weight_map[name] if weight_map else ''}; fetch the file again"
            )
    return merged


def _check_names(
    folder: Path,
    config: ModelConfig,
    expected: Mapping[str, Expected],
    stored: Mapping[str, Stored],
    allowed: set[str],
) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise WeightsError(_missing(folder, config, missing, stored))
    extra = [n for n in stored if n not in expected and n not in allowed and not is_harmless(n)]
    if extra:
        more = f" and {len(extra) - 1:,} more" if len(extra) > 1 else ""
        if extra[0].endswith(SCALE_SUFFIX):
            remedy = f"block scales need quantization_config in {CONFIG}"
        elif extra[0].endswith(CODES_SUFFIX) and config.ints is None:
            remedy = f"integer weights need quantization_config in {CONFIG}"
        else:
            remedy = (
                f"a {config.model_type} model has no such tensor.{suggest(extra[0], missing or expected)}"
            )
        raise WeightsError(f"{stored[extra[0]].file}: extra tensor {extra[0]}{more}; {remedy}")


def _missing(folder: Path, config: ModelConfig, missing: list[str], stored: Mapping[str, Stored]) -> str:
    more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
    first = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and all(name.startswith(first) for name in missing):
        remedy = "the MTP module is not in the folder: load with with_mtp=False"
    elif missing[0].endswith(SCALE_SUFFIX) and missing[0].removesuffix(SCALE_SUFFIX) in stored:
        remedy = f"{CONFIG} promises FP8 blocks (quantization_config), and their scales are not there"
    else:
        remedy = "fetch the folder again"
    return f"{folder}: missing tensor {missing[0]}{more}; {remedy}"


def _check_tensor(config: ModelConfig, name: str, wanted: Expected, stored: Stored) -> None:
    if stored.shape != wanted.shape:
        raise WeightsError(
            f"{stored.file}: {name} has shape {list(stored.shape)}, a model with this {CONFIG} needs "
            f"{list(wanted.shape)}"
        )
    if stored.dtype not in _ALLOWED[wanted.dtype]:
        hint = ""
        if stored.dtype.startswith("F8") and config.fp8 is None:
            hint = f"; FP8 needs quantization_config in {CONFIG}"
        if wanted.dtype == "float32":
            hint = "; rounded gate biases choose other experts, get them from the original folder"
        raise WeightsError(
            f"{stored.file}: {name} has dtype {stored.dtype}, expected "
            f"{' or '.join(_ALLOWED[wanted.dtype])}{hint}"
        )

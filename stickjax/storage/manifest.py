"""The manifest.json of a checkpoint describes the arrays, and lists the files with their checksums.

It also has the step, the score, and the dictionary `extra` of `Checkpoints.save`.
"""

import base64
import json
import zlib
from pathlib import Path

from stickjax.system.checksums import crc32_of


class DamagedCheckpoint(ValueError):
    """Raised if the files of a checkpoint differ from what was saved, or cannot be read."""


def read_manifest(folder: Path, step: int) -> dict:
    """Read manifest.json in `folder`, check it and all files that it lists, and return its content.

    Raise DamagedCheckpoint if a file cannot be read, if the crc32 of the manifest or of a file that it lists is wrong,
    if the step in the manifest is not `step`, or if the manifest does not describe a checkpoint.
    """
    try:
        outer = json.loads((folder / "manifest.json").read_text())
        manifest = outer["manifest"]
        if zlib.crc32(json.dumps(manifest).encode()) != outer["crc32"]:
            raise ValueError("manifest.json is damaged: its crc32 differs from the one that it records")
        if manifest["step"] != step:
            raise ValueError(f"step in manifest.json must be {step}, the name of its folder, got {manifest['step']}")
        for name, crc32 in manifest["files"].items():
            if crc32_of(folder / name) != crc32:
                raise ValueError(f"{name} is damaged: its crc32 differs from the one in manifest.json")
        rows = manifest["arrays"].values()
        if not isinstance(manifest["extra"], dict) or any(list(map(type, row)) != [list, str, int] for row in rows):
            raise ValueError("manifest.json does not describe a checkpoint: 'extra' or 'arrays' has a wrong type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(in_short(error)) from error
    return manifest


def read_score(folder: Path) -> float | None:
    """Return the score of the checkpoint in `folder` (see `Checkpoints.save`), without a check of its files.

    Return None if the checkpoint has no score, or if its manifest.json cannot be read.
    """
    try:
        score = json.loads((folder / "manifest.json").read_text())["manifest"].get("score")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return score if type(score) is float else None


def encode_bytes(value):
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"'extra' has a value of type {type(value).__name__}, which JSON cannot store: {value!r:.80}")


def decode_bytes(value: dict):
    return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value


def in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

"""Checksums of files and of the manifests that name them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def checksum(manifest: Mapping[str, Any]) -> str:
    """Give the sha256 of a manifest without its own ``checksum``."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Give the sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

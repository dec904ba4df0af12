"""Files that survive a kill: replaced whole, or appended to line by line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file that takes the place of `path` once the block ends, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")  # same directory, so the rename is atomic
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


class Journal:
    """JSON values, one a line; a kill loses at most the line that was being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Any]:
        """Return the values; what a kill left of a last line is cut off."""
        if not self.path.exists():
            return []
        with open(self.path, "r+b") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                file.truncate(whole)
        return [json.loads(line) for line in data[:whole].splitlines()]

    def append(self, *values: Any, sync: bool = False) -> None:
        """Add values; with `sync` they are on stable storage when it returns."""
        with open(self.path, "ab") as file:
            file.write(b"".join(json.dumps(v).encode() + b"\n" for v in values))
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def replace(self, values: list[Any]) -> None:
        """Put these values in the place of all others."""
        with replacing(self.path) as file:
            file.writelines(json.dumps(v).encode() + b"\n" for v in values)

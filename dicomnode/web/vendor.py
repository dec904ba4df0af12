"""The JavaScript of others that pages use, kept in the package so that nothing is fetched.

    python -m dicomnode.web.vendor            compares the files with static/vendor/manifest.json
    python -m dicomnode.web.vendor --refresh  takes them from npm anew, and writes the manifest

The second needs npm and its registry; raise VERSION, refresh, and read the difference.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "static" / "vendor"
MANIFEST = FOLDER / "manifest.json"
PACKAGE, VERSION, LICENCE = "uplot", "1.6.32", "MIT"
FILES = {
    "uPlot.iife.min.js": "package/dist/uPlot.iife.min.js",
    "uPlot.min.css": "package/dist/uPlot.min.css",
    "uPlot.LICENSE": "package/LICENSE",
}


def digests() -> dict[str, str]:
    """Return name -> SHA-256 of each file that is here."""
    return {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in FILES}


def expected() -> dict[str, str]:
    """Return what the manifest says they are."""
    files: dict[str, str] = json.loads(MANIFEST.read_text())["files"]
    return files


def refresh() -> None:
    """Take the files from npm."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=folder, check=True)
        (packed,) = Path(folder).glob("*.tgz")
        with tarfile.open(packed) as archive:
            for name, member in FILES.items():
                file = archive.extractfile(member)
                assert file is not None
                (FOLDER / name).write_bytes(file.read())
    values = {"package": PACKAGE, "version": VERSION, "licence": LICENCE, "files": digests()}
    MANIFEST.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    if "--refresh" in sys.argv[1:]:
        refresh()
    same = digests() == expected()
    print("as the manifest says" if same else "not what the manifest says")
    sys.exit(0 if same else 1)

"""What the native libraries beside this file were built from; needs neither torch nor setuptools.

``python tensorcomp_ext/_native_build.py`` in a source tree says for each library whether it was built from
the sources there: 0 where all of them were, 1 where one was not. setup.py writes the record at each build.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

RECORD = "_native_build.json"
_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}


def sources_hash(csrc: Path) -> str:
    """Identifies the native sources below a folder; those of the C++ tests do not count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in _SUFFIXES):
        if "tests" not in path.relative_to(csrc).parts:
            digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_record(folder: Path) -> dict[str, dict[str, str]]:
    """The record beside the libraries, by library; empty where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add_record(library: Path, **facts: str) -> None:
    """Note what one library, just built, was built from; notes of its neighbours stay."""
    record = read_record(library.parent) | {library.name: facts}
    (library.parent / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def state(folder: Path, csrc: Path) -> tuple[bool, str]:
    """Whether the op libraries in ``folder`` were built from ``csrc``, and in words what from."""
    libraries = sorted(folder.glob("_ops*.so"))
    if not libraries:
        return False, "no libraries here"
    now, record = sources_hash(csrc), read_record(folder)
    fresh, texts = True, []
    for library in libraries:
        facts = record.get(library.name, {})
        built = facts.get("sources", "sources nobody recorded")
        fresh &= built == now
        archs = f" for {facts['archs']}" if facts.get("archs") else ""
        texts.append(f"{library.name} from {built}{archs}")
    return fresh, f"{'' if fresh else 'STALE: '}{', '.join(texts)}; sources here {now}"


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    fresh, text = state(here, here.parent / "csrc")
    print(text)
    sys.exit(not fresh)

"""One target under atheris, in a process of its own, until its time is up. Started by `run_atheris`.

Findings do not end the run: each new one is written to the `findings` folder, and the search goes on. Crashes, hangs and
too much memory do end it; libFuzzer then leaves its own file beside that folder.
"""

from __future__ import annotations

import hashlib
import random
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import atheris

MOST_BYTES = 128
TIMEOUT_SECS = 30
RSS_LIMIT_MB = 3_000
# What reads stored bytes, and so is worth covering; the rest would only take time.
READERS = (
    *("giantstep.format", "giantstep.reading", "giantstep.codecs", "giantstep.opening", "giantstep.loading"),
    *("giantstep.shards", "giantstep.planning.load_plan", "giantstep.mapping.torch_kinds", "giantstep.mapping.tree"),
    *("giantstep.storage.record_file", "giantstep.storage.base", "giantstep.metadata", "giantstep.requesting"),
    *("giantstep.filling", "giantstep.unwrapping", "giantstep.restoring"),
)


def signature(error: BaseException) -> str:
    """Where and as what the first cause was raised: the same for all inputs that find the same."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/giantstep/" in frame.filename]
    place = f"{frames[-1].filename}:{frames[-1].name}" if frames else ""
    text = "".join("0" if letter.isdigit() else letter for letter in str(error)[:40])
    return f"{type(error).__name__} {place} {'' if frames else text}"


class Findings:
    """Writes the first input of every signature."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, error: Exception, data: bytes) -> None:
        """Write it, if it is new."""
        found = signature(error)
        if found in self._seen:
            return
        self._seen.add(found)
        name = hashlib.sha256(found.encode()).hexdigest()[:10]
        if (self._folder / f"{name}.bin").exists():
            return  # found in an earlier round
        (self._folder / f"{name}.bin").write_bytes(data)
        (self._folder / f"{name}.txt").write_text(f"{found}\n{''.join(traceback.format_exception(error))}")


def write_seeds(folder: Path, objects: dict[str, bytes]) -> None:
    """Inputs to begin with: random decisions, and for objects the valid texts."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(1)
    seeds = [chance.randbytes(chance.randrange(1, 40)) for _ in range(200)]
    seeds += [b"\x01\x00\x00" + data[15 : 15 + MOST_BYTES] for data in objects.values()]
    for data in seeds:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> None:
    """Arguments: target, seconds, and the folder to work in."""
    target, secs, work = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    # As in the tests: a warning about hostile bytes is a finding.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
    import torch  # noqa: F401 - not to be instrumented

    with atheris.instrument_imports(include=list(READERS)):
        from . import seeds, targets

        targets.warm_up()
    findings = Findings(work / "findings")
    write_seeds(work / "corpus", seeds.encoded_objects() if target == "object" else {})

    def one_input(data: bytes) -> Any:
        try:
            targets.run(target, data)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            findings.note(error, data)

    limits = [f"-max_total_time={secs}", f"-timeout={TIMEOUT_SECS}", f"-rss_limit_mb={RSS_LIMIT_MB}", f"-max_len={MOST_BYTES}"]
    places = ["-print_final_stats=1", f"-artifact_prefix={work}/", str(work / "corpus")]
    atheris.Setup([sys.argv[0], *limits, *places], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

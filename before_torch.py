"""What must have happened before torch is loaded; both packages call it first."""

import gc
import os
import sys
from importlib.metadata import PackageNotFoundError, version

MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""GHSA-w37p-236h-pfx3."""
OLDEST_SAFE = {
    "torch": ((2, 10), "loading weights corrupts memory, CVE-2026-24747"),
    "transformers": ((5, 3), "runs code with trust_remote_code off, CVE-2026-4372"),
    "lightning": ((2, 6, 6), "a checkpoint runs code, Lightning's issue 21822"),
}


def prepare() -> None:
    """Refuses versions that are known to be bad, and sets what is read when torch is loaded."""
    if (line := refusal()) is not None:
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    # Idle OpenMP threads spin for some microseconds and then sleep. Spinning for ever, their default, makes a step ten
    # times slower beside another busy process; sleeping at once halves the speed of small models.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Importing Lightning and transformers makes a million objects; fewer collections save half a second of start-up.
    # `lightning_modules.cli.main` puts Python's own thresholds back.
    gc.set_threshold(50_000, 20, 100)


def refusal() -> str | None:
    """One line about the first bad package found. Nothing is imported: a malicious upload acts when it is."""
    for package in sorted({*MALICIOUS, *OLDEST_SAFE}):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if installed in MALICIOUS.get(package, ()):
            return f"{package} {installed} is a malicious upload: remove this environment and change its secrets"
        oldest, why = OLDEST_SAFE.get(package, ((0,), ""))
        if _numbers(installed) < oldest:
            return f"{package} {installed}: {why}; pip install --upgrade '{package}>={'.'.join(map(str, oldest))}'"
    return None


def _numbers(installed: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    parts = installed.partition("+")[0].split(".")
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)

"""``docs/licences.md``: what each locked package says of its licence. ``make licences`` writes it."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
LOCKS = ("service", "test")
_HEAD = """# Licences of what is installed

Written by `make licences` from the locks in `requirements/` and from what the installed packages say of themselves.
`service` is what the container installs; `test` is what tests and training install besides, torch excepted, which is
BSD-3-Clause. A package without a licence here is one for other platforms than the one that wrote this page.

| package | version | in | licence |
|---|---|---|---|
"""


def locked(lock: str) -> dict[str, list[str]]:
    """Versions of each package in a lock; several where they differ by Python or platform."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(
        r"^([\w.-]+)==([^ \\;]+)", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.M
    ):
        found.setdefault(name, []).append(version)
    return found


def rows() -> list[tuple[str, str, str]]:
    """Package, versions, and the lock that it is in first."""
    service, test = (locked(lock) for lock in LOCKS)
    return [
        (name, ", ".join((service | test)[name]), "service" if name in service else "test")
        for name in sorted(service | test)
    ]


def main() -> None:
    """Write the page from what ``pip-licenses --format json`` told."""
    told = json.loads(Path(sys.argv[1]).read_text())
    licences = {re.sub(r"[-_.]+", "-", each["Name"]).lower(): each["License"] for each in told}
    lines = [
        f"| {name} | {version} | {lock} | {' '.join(licences.get(name, '–').split()).replace('|', '/')} |"
        for name, version, lock in rows()
    ]
    PAGE.write_text(_HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

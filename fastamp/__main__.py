"""The command line: `fastamp`, or `python -m fastamp`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

PACKAGES = ("click", "rich", "plotext")  # of the extra "cli"


def main() -> None:
    """Runs a command, or says in one line what has to be installed for it."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        sys.exit(f'fastamp: not installed: {", ".join(missing)}; pip install "fastamp[cli]"')
    from fastamp.cli import main as command

    command(prog_name="fastamp")


if __name__ == "__main__":
    main()

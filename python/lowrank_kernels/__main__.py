"""``python -m lowrank_kernels``: the command line; ``doctor`` also works without its extras."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Entry point of the ``lowrank-kernels`` command."""
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if not missing:
        from .cli import group

        group(prog_name="lowrank-kernels")
    elif sys.argv[1:2] == ["doctor"]:
        from .doctor import print_report

        print_report()
    else:
        from .files import pip_install

        print(f"error: the command line needs {' and '.join(missing)}: {pip_install()}", file=sys.stderr)
        print("without them there is: python -m lowrank_kernels doctor", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

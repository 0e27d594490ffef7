"""``python -m bench [--only NAME ...] [--quick] [--out CSV] [--seconds N]``: run the benches, append their rows, print them."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .harness import DATA, Session, Skipped, machine_slug, warn_if_busy
from .rows import print_table

GPU_BENCHES = ("three_factor_cuda", "completion_cuda", "encoder_cuda")  # skipped without a GPU
BENCHES = ("completion", "three_factor", "compress", "training", "scale", "peers", *GPU_BENCHES)


def part_share(bench: str, part: str) -> float:
    return getattr(importlib.import_module(f"bench.bench_{bench}").PARTS[part], "share", 1.0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(BENCHES)}, or one part: training.ratings")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; rows go to a temporary file")
    parser.add_argument("--out", type=Path, metavar="CSV", help="default: bench/data/<machine>.csv, of a GPU <gpu>.csv")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no case that would not end in this time")
    options = parser.parse_args(arguments)

    wanted: dict[str, list[str]] = {}
    for name in options.only or BENCHES:
        bench, _, part = name.partition(".")
        if bench not in BENCHES:
            parser.error(f"--only: there is no bench {bench!r}; there are {', '.join(BENCHES)}")
        parts = importlib.import_module(f"bench.bench_{bench}").PARTS
        if part and part not in parts:
            parser.error(f"--only: bench {bench} has no part {part!r}; it has {', '.join(parts)}")
        wanted.setdefault(bench, []).extend([part] if part else parts)

    if options.out is not None:
        out = options.out
    elif options.quick:
        out = Path(tempfile.mkdtemp(prefix="bench-")) / f"{machine_slug()}.csv"
    else:
        out = DATA / f"{machine_slug()}.csv"
    session = Session(out, quick=options.quick)
    if not options.quick:
        warn_if_busy(session.say)
    end = time.monotonic() + options.seconds if options.seconds is not None else None
    shares = [part_share(bench, part) for bench, parts in wanted.items() for part in parts]
    try:
        for bench, parts in wanted.items():
            functions = importlib.import_module(f"bench.bench_{bench}").PARTS
            for part in parts:
                if end is not None:  # a share of what is left: the first part must not leave the others without any
                    now = time.monotonic()
                    session.deadline = now + (end - now) * shares[0] / sum(shares)
                shares.pop(0)
                if not session.time_for(f"{bench}.{part}", 1.0):
                    continue
                try:
                    functions[part](session)
                except Skipped as reason:
                    session.skip(f"{bench}.{part}", str(reason))
                except Exception as error:  # one broken part does not take the others with it
                    traceback.print_exc()
                    session.fail(f"{bench}.{part}: {type(error).__name__}: {error}")
    finally:
        print_table(session)
        print(f"{len(session.rows)} rows appended to {out}")
    missed = sum(row["met"] == "no" for row in session.rows)
    if missed and not options.quick:
        print(f"{missed} rows miss their bar")
    return 1 if session.errors else 0


if __name__ == "__main__":
    sys.exit(main())

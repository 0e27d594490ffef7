"""Complete a photograph with 70 % of its pixels removed, and movie ratings and air measurements where they are at hand.

python examples/demo.py --out out/demo
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from lowrank_kernels import cli

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "chelsea.png"


def complete(*arguments: object) -> None:
    """Run and show one command."""
    words = ["complete", *map(str, arguments), "--threads", "1", "--overwrite"]  # small problems: threads would only wait
    print(f"\n$ lowrank-kernels {' '.join(os.path.relpath(w) if os.path.isabs(w) else w for w in words)}\n", flush=True)
    try:
        code = cli.group.main(words, standalone_mode=False)
    except cli.Refusal as error:
        error.show()
        sys.exit(error.exit_code)
    if code:
        sys.exit(code)


def find(*parts: str) -> tuple[Path | None, list[Path]]:
    """A data set, and the places looked at."""
    folders = [os.environ.get("LOWRANK_DATA"), HERE.parent.parent / "shared" / "data"]
    places = [Path(folder).joinpath(*parts) for folder in folders if folder]
    return next((place for place in places if place.is_file()), None), places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the results")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    print("A photograph with 70 % of its pixels removed:")
    compare, picture, curve = out / "photograph_before_after.png", out / "photograph.png", out / "photograph_curve.png"
    complete(PICTURE, "--sampling-rate", 0.3, "-o", picture, "--compare", compare, "--plot", curve)

    for title, name, source, arguments in (
        ("MovieLens ratings", ("ml-latest-small", "ratings.csv"), "https://grouplens.org/datasets/movielens", ()),
        (
            "Hourly air quality, gaps filled",
            ("air-quality", "AirQuality.csv"),
            "https://archive.ics.uci.edu/dataset/360/air+quality (saved with commas and decimal points)",
            ("--missing-value", -200, "--window", 1, "-o", out / "air-quality_filled.csv"),
        ),
    ):
        found, places = find(*name)
        if found is not None:
            print(f"\n{title}, 10 % held out:")
            complete(found, *arguments, "--plot", out / f"{name[0]}_curve.png")
        else:
            print(f"\n{title}: not at hand, left out. Looked for {', '.join(map(str, places))}.")
            print(f"Get {name[0]} from {source} and set LOWRANK_DATA to the folder above it.")

    print(f"\n{time.perf_counter() - started:.0f} s; the results are in {out}:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:<30} {path.stat().st_size / 1024:6.0f} KiB")
    print("Look first at photograph_before_after.png: original, what was left, completed.")


if __name__ == "__main__":
    main()

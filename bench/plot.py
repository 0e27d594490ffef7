"""``python -m bench.plot``: figures and Markdown tables from the rows in ``bench/data``; ``--short CSV``: a short text.

The newest row of each case, contender and thread count counts. Writes ``docs/figures/*.png`` and the blocks between
``<!-- bench:begin -->`` and ``<!-- bench:end -->``: in README.md the rows with a bar and those we lose, in bench/README.md
all of them. Layers stand by their time over the frozen linear layer, one line a case. Rows measured on a GPU, where there
are any, have tables and a figure of their own. ``--check`` writes nothing and exits with 1 when a block or a figure is not
what the rows give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import DATA, ROOT
from .rows import read_rows, write_atomically

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS = "lowrank_kernels"
FROZEN = "frozen linear"
OVER = f"over {FROZEN}"
LAYERS = ("eager chain", "addmm chain", "compiled chain", "PEFT lora.Linear", OURS)

SHORT_LINES, SHORT_WIDTH = 40, 78

Row = dict[str, str]


def on_gpu(row: Row) -> bool:
    """Measured on a GPU: the column of the SIMD level then has its architecture. A rehearsal has the CPU's."""
    return row["simd"].startswith("sm_")


def newest(rows: Sequence[Row]) -> list[Row]:
    """One row a machine, bench, case, contender and thread count, in the order in which cases first appear."""
    keys = ("machine", "bench", "case", "contender", "threads")
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:  # files are append-only: later is newer
        latest[tuple(row[key] for key in keys)] = row
    return list(latest.values())


def number(text: str, digits: int = 3) -> str:
    if not text:
        return ""
    value = float(text)
    return (
        f"{value:.{digits}g}" if 1e-3 <= abs(value) < 10**digits or value == 0 else f"{value:.{digits}g}".replace("e-0", "e-")
    )


def milliseconds(text: str) -> str:
    if not text:
        return ""
    value = float(text)
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def result(row: Row) -> str:
    return f"{row['metric']} {number(row['value'], 4)}" if row["metric"] else ""


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, lines)])


def speed(row: Row) -> str:
    if not row["ratio"] or row["contender"] == row["baseline"]:
        return ""
    return f"{number(row['ratio'])}x {row['baseline']}"


def layers(rows: Sequence[Row], all_of_them: bool) -> str:
    """Times over the frozen linear layer, a line for every case and number of threads.

    Not all of them: those with a bar on that time, and those where a plain chain is faster.
    """
    lines = []
    for key in dict.fromkeys((r["machine"], r["case"], r["threads"]) for r in rows):
        found = {r["contender"]: r for r in rows if (r["machine"], r["case"], r["threads"]) == key}
        ours = found.get(OURS)
        if not all_of_them and (ours is None or (OVER not in ours["bar"] and float(ours["ratio"] or 1) >= 1)):
            continue
        cells = [found[name]["value"] and number(found[name]["value"]) if name in found else "" for name in LAYERS]
        frozen = milliseconds(found[FROZEN]["median_ms"]) if FROZEN in found else ""
        judged = [speed(ours), ours["bar"], ours["met"]] if ours else ["", "", ""]
        lines.append([key[1], key[2], frozen, *cells, *judged])
    if not lines:
        return ""
    header = ("layer", "threads", FROZEN, *LAYERS, "speed", "bar, set beforehand", "met")
    return f"Time over the frozen linear layer, which is 1:\n\n{table(header, lines)}"


def gpu_tables(rows: Sequence[Row]) -> str:
    """Rows of GPUs alone: layers over the frozen one, completion, the encoder's step, the ceilings of the run."""
    parts = []
    for machine in dict.fromkeys(r["machine"] for r in rows):
        own = [r for r in rows if r["machine"] == machine]
        parts.append(f"On a GPU, {machine}:")
        parts.append(layers([r for r in own if r["metric"] == OVER], all_of_them=False))
        completion = [r for r in own if r["bench"] == "completion_cuda"]
        lines = []
        for case in dict.fromkeys(r["case"] for r in completion):
            found = [r for r in completion if r["case"] == case]
            best = [
                min((r for r in found if wanted(r["contender"])), key=lambda r: float(r["median_ms"]), default=None)
                for wanted in (lambda c: "autograd COO" in c, lambda c: "CSR" in c, lambda c: c == f"{OURS}, autograd")
            ]
            judged = next((r for r in found if r["bar"]), best[2])
            cells = [milliseconds(r["median_ms"]) if r else "" for r in best]
            lines.append([case, *cells, *([speed(judged), judged["bar"], judged["met"]] if judged else [""] * 3)])
        if lines:
            header = ("loss and all gradients", "eager autograd", "torch.sparse", OURS, "speed", "bar, set beforehand", "met")
            parts.append(table(header, lines))
        lines = [
            [r["case"], r["contender"], milliseconds(r["median_ms"]), result(r), number(r["peak_mb"], 4), r["bar"], r["met"]]
            for r in own
            if r["bench"] == "encoder_cuda"
        ]
        if lines:
            parts.append(table(("training step", "how", "median", "result", "peak MB", "bar, set beforehand", "met"), lines))
        reached = [
            f"{r['case']}: " + (f"{float(r['gflops']) / 1000:.3g} TFLOP/s" if r["gflops"] else f"{float(r['gbs']):.4g} GB/s")
            for r in own
            if r["bench"] == "ceilings_cuda" and (r["gflops"] or r["gbs"])
        ]
        if reached:
            parts.append(f"Ceilings in the same run: {'; '.join(reached)}.")
    return "\n\n".join(filter(None, parts))


def summary(rows: Sequence[Row]) -> str:
    """For README.md: what has a bar, and what we lose against the fastest other."""
    gpu, rows = [r for r in rows if on_gpu(r)], [r for r in rows if not on_gpu(r)]
    return "\n\n".join(filter(None, [cpu_tables(rows) if rows else "", gpu_tables(gpu)]))


def cpu_tables(rows: Sequence[Row]) -> str:
    barred = [
        [r["case"], r["contender"], r["threads"], milliseconds(r["median_ms"]), result(r), speed(r), r["bar"], r["met"]]
        for r in rows
        if r["bar"] and r["metric"] != OVER
    ]
    parts = [
        table(("what", "how", "threads", "median", "result", "speed", "bar, set beforehand", "met"), barred),
    ]
    lost = []
    for row in rows:
        others = [
            r
            for r in rows
            if all(r[key] == row[key] for key in ("machine", "bench", "case", "threads"))
            and OURS not in r["contender"]
            and r["median_ms"]
        ]
        if row["bench"] != "completion" or OURS not in row["contender"] or "bare" in row["contender"] or not others:
            continue
        best = min(others, key=lambda r: float(r["median_ms"]))
        if float(best["median_ms"]) < float(row["median_ms"]):
            cells = [row["case"], row["contender"], row["threads"], milliseconds(row["median_ms"])]
            lost.append([*cells, f"{best['contender']}: {milliseconds(best['median_ms'])}"])
    if lost:
        parts.append("Where something else is faster:")
        parts.append(table(("what", "how", "threads", "median", "fastest other"), lost))
    shown = layers([r for r in rows if r["metric"] == OVER], all_of_them=False)
    if shown:
        parts.append(shown)
    return "\n\n".join(parts)


def everything(rows: Sequence[Row]) -> str:
    parts = [sections([r for r in rows if not on_gpu(r)])]
    for machine in dict.fromkeys(r["machine"] for r in rows if on_gpu(r)):
        found = sections([r for r in rows if on_gpu(r) and r["machine"] == machine])
        parts.append(found.replace("### ", f"### {machine}, "))
    return "\n\n".join(filter(None, parts))


def sections(rows: Sequence[Row]) -> str:
    header = ("contender", "threads", "median", "quartiles, ms", "GFLOP/s", "of sgemm", "GB/s", "of copy")
    header = (*header, "peak MB", "error", "result", "speed", "bar", "met", "note")
    compared = layers([r for r in rows if r["metric"] == OVER], all_of_them=True)
    parts = [f"### three_factor: layers\n\n{compared}"] if compared else []
    for case in dict.fromkeys((r["bench"], r["case"]) for r in rows if r["metric"] != OVER):
        lines = [
            [
                r["contender"],
                r["threads"],
                milliseconds(r["median_ms"]),
                f"{number(r['q25_ms'])} - {number(r['q75_ms'])}" if r["q25_ms"] else "",
                number(r["gflops"]),
                f"{float(r['share_sgemm']):.1%}" if r["share_sgemm"] else "",
                number(r["gbs"]),
                f"{float(r['share_copy']):.1%}" if r["share_copy"] else "",
                number(r["peak_mb"]),
                f"{float(r['error']):.0e}" if r["error"] else "",
                result(r),
                speed(r),
                r["bar"],
                r["met"],
                r["note"],
            ]
            for r in rows
            if (r["bench"], r["case"]) == case
        ]
        used = [i for i in range(len(header)) if any(line[i] for line in lines)]
        body = table([header[i] for i in used], [[line[i] for i in used] for line in lines])
        parts.append(f"### {case[0]}: {case[1]}\n\n{body}")
    return "\n\n".join(parts)


def provenance(rows: Sequence[Row]) -> str:
    """Which machine, which software, when: under every table."""
    lines = []
    for machine in dict.fromkeys(r["machine"] for r in rows):
        own = [r for r in rows if r["machine"] == machine]
        dates = sorted(r["date"][:10] for r in own)
        revisions = sorted({r["revision"] + ("+" if r["dirty"] == "yes" else "") for r in own})
        level, command = ("", "make gpu") if on_gpu(own[0]) else ("SIMD ", "make bench")
        versions = sorted({f"torch {r['torch']}, Python {r['python']}, {level}{r['simd']}" for r in own})
        load = max((float(r["load"]) for r in own if r["load"]), default=0.0)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines.append(
            f"{machine}; {'; '.join(versions)}; {when}; revision {', '.join(revisions)}; highest load average {load:.1f}. "
            f"Medians, interleaved, checked against float64; rows in bench/data, made by `{command}`."
        )
    return "\n".join(lines)


def block(file: Path, body: str) -> tuple[str, str]:
    """The file's text now, and with the block replaced."""
    text = file.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{file.name}: wants exactly one {BEGIN} and, after it, one {END}; add them where the table belongs")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return text, f"{before}{BEGIN}\n{body}\n{END}{after}"


# ---------------------------------------------------------------------- figures


LAYER = re.compile(r"forward and backward, T=(\d+), (\d+ -> \d+), k=16(, dropout [\d.]+)?")


def figures(rows: Sequence[Row]) -> dict[str, list[tuple[str, list[Row]]]]:
    """File name -> titled panels of rows."""
    gpu, rows = [r for r in rows if on_gpu(r)], [r for r in rows if not on_gpu(r)]
    result: dict[str, list[tuple[str, list[Row]]]] = {}
    timed = [r for r in rows if r["bench"] == "completion" and r["median_ms"]]
    # One picture of the sizes, one of the other shapes.
    sizes = [r for r in timed if " entries" in r["case"] and r["case"].endswith("k=16") and not r["case"].startswith("50 ")]
    quality = [r for r in rows if r["bench"] in ("training", "peers") and r["metric"].startswith(("RMSE", "PSNR"))]
    pictures = {"completion": sizes, "completion_shapes": [r for r in timed if r not in sizes], "quality": quality}
    for name, chosen in pictures.items():
        cases = dict.fromkeys((r["bench"], r["case"]) for r in chosen)
        panels = [
            (f"{bench}: {case}", [r for r in chosen if (r["bench"], r["case"]) == (bench, case)]) for bench, case in cases
        ]
        if panels:
            result[f"{name}.png"] = panels
    threads = max((int(r["threads"]) for r in rows if r["metric"] == OVER), default=0)
    overhead = [(LAYER.fullmatch(r["case"]), r) for r in rows if r["metric"] == OVER and r["threads"] == str(threads)]
    titles = dict.fromkeys(found[2] + (found[3] or "") for found, _ in overhead if found)
    panels = [(t, [r for found, r in overhead if found and found[2] + (found[3] or "") == t]) for t in titles]
    if panels:
        result["three_factor.png"] = panels
    shown = [r for r in gpu if r["bench"].endswith("_cuda") and r["bench"] != "ceilings_cuda" and r["median_ms"]]
    panels = []
    for key in dict.fromkeys((r["machine"], r["case"]) for r in shown):
        found = [r for r in shown if (r["machine"], r["case"]) == key]
        if any(r["bar"].count("<=") or "ratio >= 8" in r["bar"] for r in found):  # a bar of its own
            panels.append((f"{key[0]}: {key[1]}", found))
    if panels:
        result["gpu.png"] = panels
    return result


def digest(panels: list[tuple[str, list[Row]]]) -> str:
    return hashlib.sha256(json.dumps(panels).encode()).hexdigest()


def draw(path: Path, panels: list[tuple[str, list[Row]]]) -> None:
    """Ours in colour: times over the frozen layer by the number of tokens, or a point a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    curves = bool(LAYER.fullmatch(panels[0][1][0]["case"]))
    height = 10 if curves else max(len(rows) for _, rows in panels)
    figure, axes = plt.subplots(lines, columns, figsize=(5.6 * columns, lines * (0.9 + 0.24 * height)), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        (draw_curves if curves else draw_points)(axis, rows)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        figure.savefig(temporary, dpi=120, metadata={"Description": digest(panels), "Software": ""})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def draw_points(axis: Any, rows: list[Row]) -> None:
    """Points of the metric where there is one, else of times on a logarithmic axis. Neither axis starts at zero: no bars."""
    metric = rows[0]["metric"]
    values = [float(r["value"] if metric else r["median_ms"]) for r in rows]
    names = [f"{r['contender']} ({r['threads']})" if r["threads"] else r["contender"] for r in rows]
    colours = ["#c1440e" if OURS in r["contender"] else "#9aa5b1" for r in rows]
    places = range(len(rows), 0, -1)
    axis.scatter(values, list(places), color=colours, zorder=3)
    axis.hlines(list(places), 0, 1, transform=axis.get_yaxis_transform(), color="#e4e7eb", linewidth=0.8)
    axis.set_yticks(list(places), names)
    if not metric:
        axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.set_ylim(0.4, len(rows) + 0.6)
    threads = " (number of threads in brackets)" if rows[0]["threads"] else ""
    axis.set_xlabel(metric or f"ms a step{threads}", fontsize=7)
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:.4g}", (value, place), (6, 0), textcoords="offset points", va="center", fontsize=6)


def draw_curves(axis: Any, rows: list[Row]) -> None:
    """The time over the frozen layer, a curve for every way to do the adapter's work."""
    styles = dict(zip(LAYERS, ("s:", "v--", "^-.", "x:", "o-"), strict=True))
    for name, style in styles.items():
        points = sorted((int(LAYER.fullmatch(r["case"])[1]), float(r["value"])) for r in rows if r["contender"] == name)  # type: ignore[index]
        if points:
            axis.plot(
                *zip(*points, strict=True), style, label=name, color="#c1440e" if name == OURS else "#7b8794", linewidth=1
            )
    axis.axhline(1, color="#e4e7eb", linewidth=0.8)
    axis.set_xscale("log")
    tokens = sorted({int(LAYER.fullmatch(r["case"])[1]) for r in rows})  # type: ignore[index]
    axis.set_xticks(tokens, [str(count) for count in tokens])
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = [tick for tick in (1, 1.1, 1.2, 1.5, 2, 3, 5, 8) if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("tokens", fontsize=7)
    axis.set_ylabel(f"time over the frozen linear layer ({rows[0]['threads']} threads)", fontsize=7)
    axis.legend(fontsize=6, frameon=False)


def is_current(path: Path, panels: list[tuple[str, list[Row]]]) -> bool:
    """A figure carries the digest of its rows."""
    return path.exists() and digest(panels).encode() in path.read_bytes()


# ---------------------------------------------------------------------- a short text


def shortened(case: str) -> str:
    words = {
        ", bfloat16, float32 factors": "",
        "forward and backward": "fwd+bwd",
        "training step of a BERT-base-shaped encoder": "BERT-base step",
        "random rows of 64 bytes from a table": "64-byte rows",
        "CPU rehearsal of ": "rehearsed ",
    }
    for long, brief in words.items():
        case = case.replace(long, brief)
    return case


def short(rows: Sequence[Row]) -> str:
    """Plain text of at most 40 lines: rows with a bar of their own, ceilings, then what else is ours."""

    def place(row: Row) -> int:
        if "<=" in row["bar"] or (row["bar"] and row["bench"] not in ("three_factor", "three_factor_cuda")):
            return 0
        return 1 if row["met"] == "no" else 2 if row["bench"] == "ceilings_cuda" else 3 if row["bar"] else 4

    chosen = sorted((r for r in rows if r["bar"] or OURS in r["contender"] or r["bench"] == "ceilings_cuda"), key=place)
    judged = [r for r in rows if r["bar"]]
    machines = ", ".join(dict.fromkeys(f"{r['machine']} ({r['simd']})" for r in rows))
    lines = [f"{machines}: {sum(r['met'] == 'yes' for r in judged)} of {len(judged)} rows with a bar meet it"]
    room = SHORT_LINES - 3 if len(chosen) > SHORT_LINES - 2 else len(chosen)
    cells = [
        [
            shortened(f"{r['bench'].removesuffix('_cuda')}: {r['case']}"),
            r["contender"].removeprefix(f"{OURS}, "),
            milliseconds(r["median_ms"]),
            result(r) or (f"{number(r['gflops'])} GFLOP/s" if r["gflops"] else f"{number(r['gbs'])} GB/s" if r["gbs"] else ""),
            speed(r),
            r["bar"],
            r["met"],
        ]
        for r in chosen[:room]
    ]
    cells.insert(0, ["case", "how", "median", "result", "speed", "bar", "met"])
    cells = [[*(cell[:SHORT_WIDTH] for cell in line)] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    if len(chosen) > room:
        lines.append(f"... and {len(chosen) - room} more rows")
    return "\n".join(lines)


# ---------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, nargs="+", help="default: all of bench/data")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--details", type=Path, default=ROOT / "bench" / "README.md", help="file for the table of all rows")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when something is stale")
    parser.add_argument(
        "--short", type=Path, metavar="CSV", help=f"print it in at most {SHORT_LINES} lines and do nothing else"
    )
    options = parser.parse_args(arguments)
    if options.short:
        if not options.short.is_file() or not (rows := newest(read_rows(options.short))):
            print(f"no rows in {options.short}", file=sys.stderr)
            return 1
        print(short(rows))
        return 0
    files = options.csv or sorted(DATA.glob("*.csv"))
    rows = newest([row for file in files for row in read_rows(file)])
    if not rows:
        print(f"no rows in {DATA.relative_to(ROOT)}; run `make bench` first", file=sys.stderr)
        return 1
    stale = []
    for file, body in ((options.readme, summary(rows)), (options.details, everything(rows))):
        now, wanted = block(file, f"{body}\n\n{provenance(rows)}")
        if now != wanted:
            stale.append(file.name)
            if not options.check:
                write_atomically(file, wanted)
    for name, panels in figures(rows).items():
        if not is_current(options.figures / name, panels):
            stale.append(name)
            if not options.check:
                draw(options.figures / name, panels)
    if options.check and stale:
        print(f"stale: {', '.join(stale)}; run `python -m bench.plot`", file=sys.stderr)
        return 1
    print(f"{len(rows)} rows; " + (f"wrote {', '.join(stale)}" if stale else "everything is current"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

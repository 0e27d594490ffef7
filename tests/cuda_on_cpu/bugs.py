"""Bugs seeded into copies of the kernels, and the means that must catch each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_kernels.testing import CompletionCase, ThreeFactorCase

from . import driver
from .calls import HALVES, CompletionRun, ThreeFactorRun

# What a means looks like: in the report of the driver, or in the message of a check.
REPORTS = {
    "guard page": r"access of address .*(past the end|before the start)",
    "barrier": r"__syncthreads under a condition|deadlock",
    "alignment": r"misaligned",
    "race": r"WARNING: ThreadSanitizer: data race",
}
CHECKS = {"NaN": r"not finite", "numbers": r"is off by", "mask": r"another mask|not zero where"}


@dataclass(frozen=True)
class Bug:
    """The text ``old``, first found after ``after``, becomes ``new``."""

    name: str
    file: str
    after: str
    old: str
    new: str
    means: str  # that must catch it: of REPORTS or CHECKS, or "schedules", whose results differ
    flavour: str = "quick"

    def __str__(self) -> str:
        return self.name

    def edit(self, text: str) -> str:
        start = text.index(self.after)
        place = text.index(self.old, start)
        return text[:place] + self.new + text[place + len(self.old) :]


def _three(name: str, after: str, old: str, new: str, means: str, flavour: str = "quick") -> Bug:
    return Bug(f"three_factor-{name}", "three_factor_kernels.cuh", after, old, new, means, flavour)


def _completion(name: str, after: str, old: str, new: str, means: str, flavour: str = "quick") -> Bug:
    return Bug(f"completion-{name}", "completion_cuda.cu", after, old, new, means, flavour)


SYNC = "__syncthreads();"
SHRINK, EXPAND, OUTER, FINISH = "shrink_kernel(const", "expand_kernel(const", "outer_kernel(const", "finish_kernel(const"
PRODUCT, CHAIN, PROLOGUE = "product_kernel(const", "chain_kernel(const", "prologue_kernel(const"
ENTRIES, SEGMENTS, LOSS = "entries_kernel(const", "segments_kernel(const", "loss_kernel(const"

BUGS = [
    _three("shrink-no-sync-in-the-pipeline", SHRINK, "__syncthreads();  // the stage is complete", "//", "NaN"),
    _three("shrink-waits-for-a-group-too-few", SHRINK, "copy_wait<kStages - 2>", "copy_wait<kStages - 1>", "NaN"),
    _three("shrink-no-sync-before-reuse", SHRINK, "__syncthreads();  // the stages are free", "//", "schedules"),
    _three("expand-no-wait", EXPAND, "copy_wait<0>();", "", "NaN"),
    _three("expand-no-sync-before-output", "b[1], b[3]);\n    }\n  }\n  __sync", SYNC, "", "schedules"),
    _three("expand-last-row-not-written", EXPAND, "t >= p.rows", "t + 1 >= p.rows", "NaN"),
    _three("expand-sync-under-a-condition", EXPAND, SYNC, f"if (warp < 2) {SYNC}", "barrier"),
    _three("expand-misaligned-tile", EXPAND, "2 * kExpandRows * kRank;", "2 * kExpandRows * kRank + 8;", "alignment"),
    _three("expand-two-blocks-write-one-slice", EXPAND, "/ tiles * kExpandRows", "/ tiles * (kExpandRows / 2)", "race", "tsan"),
    _three("outer-waits-for-a-group-too-few", OUTER, "copy_wait<kStages - 2>", "copy_wait<kStages - 1>", "NaN"),
    _three("outer-fragments-not-swapped", OUTER, "{a[0], a[2], a[1], a[3]}", "{a[0], a[1], a[2], a[3]}", "numbers"),
    _three("outer-shares-of-wrong-rows", OUTER, "lane / 4 + 8 * bottom;", "lane / 4 + 4 * bottom;", "NaN"),
    _three("outer-all-ranges-write-one-slice", OUTER, "job.partials + part * job.columns * p.rank", "job.partials", "NaN"),
    _three("outer-rank-bound-dropped", OUTER, "column < job.columns && k < p.rank", "column < job.columns", "guard page"),
    _three("finish-no-sync", FINISH, SYNC, "", "NaN"),
    _three("chain-no-sync", CHAIN, SYNC, "", "NaN"),
    _three("prologue-no-sync", "next[j] = sum;\n      }\n      __sync", SYNC, "", "NaN"),
    _three("product-no-sync-after-tiles", PRODUCT, SYNC, "", "NaN"),
    _three("product-no-sync-before-tiles", "tile_sum[i / kMyColumns]", SYNC, "", "schedules"),
    _three("row-bound-dropped", "void load_tile", "row + r < row_end", "row + r < row_end + 8", "guard page"),
    _three("philox-a-round-less", "uint4 philox", "round < 10", "round < 9", "mask"),
    _three("mask-of-the-next-group", "void drop_tile", "n / 8 + c);", "n / 8 + c + 1);", "numbers"),
    _completion("wrong-shuffle-distance", "T sum4", "odd ? s[0] : s[1], 1)", "odd ? s[0] : s[1], 2)", "numbers"),
    _completion("no-weight", ENTRIES, "weighted = weight * error", "weighted = (weight * 0 + 1) * error", "numbers"),
    _completion("segment-off-by-one", ENTRIES, "rest : p.long_row)", "rest : p.long_row - 1)", "numbers"),
    _completion("entry-bound-dropped", ENTRIES, "place < last ? place : last", "place < last ? last : place", "guard page"),
    _completion("empty-row-not-written", ENTRIES, "row_sums[lane] = count > 0", "if (count > 0) row_sums[lane] = true", "NaN"),
    _completion("misaligned-rows", ENTRIES, "(p.own + i * p.width)", "(p.own + i * p.width + 1)", "alignment", "asan"),
    _completion("entries-no-sync", "warps[threadIdx.x / 32] = total", SYNC, "", "NaN"),
    _completion("segments-no-sync", SEGMENTS, SYNC, "", "NaN"),
    _completion("loss-no-sync", LOSS, SYNC, "", "schedules"),
]

# The copies instantiate little: bfloat16 with float32 factors and float32, padded ranks 16 and 64; float with int32.
_ABSENT = """#define LRK_ABSENT(T, I)                                                              \\
  int64_t completion_cuda_workspace(const CompletionPass<T, I>&, bool) { return 0; }  \\
  void completion_pass_cuda(const CompletionPass<T, I>&, void*, T*, void*) {}
"""
_REDUCTIONS = {
    "three_factor_cuda.cu": [
        (r"    case (32|128|256): return f\(std::integral_constant.*\n", "", 3),
        (r"      case DType::float64:\n.*\n        break;\n", "", 1),
        (r"      case DType::bfloat16: return .*", "      case DType::bfloat16: return f(__nv_bfloat16(), float());", 1),
        (r"      case DType::float16: return .*\n", "", 1),
        (r"switch \(p\.type\) \{", "switch (p.type) {\n      default: break;", 1),
    ],
    "completion_cuda.cu": [
        (r"LRK_DEFINE_COMPLETION\(float, int32_t\)\n", _ABSENT + "LRK_DEFINE_COMPLETION(float, int32_t)\n", 1),
        (r"LRK_DEFINE_COMPLETION\((float, int64_t|double, int32_t|double, int64_t)\)", r"LRK_ABSENT(\1)", 3),
    ],
}


def reduced(name: str, text: str) -> str:
    for pattern, replacement, count in _REDUCTIONS.get(name, ()):
        text, found = re.subn(pattern, replacement, text)
        if found != count:
            raise AssertionError(f"{name}: {pattern!r} matches {found} times, not {count}: mend _REDUCTIONS")
    return text


def build(bug: Bug | None, folder: Path) -> Path:
    """The driver with reduced kernels and the bug in them, if any."""
    copy = folder / (str(bug) if bug else "none")
    copy.mkdir()
    for path in driver.CSRC.iterdir():
        if path.suffix in (".h", ".cuh", ".cu"):
            shutil.copy(path, copy)
    for name in _REDUCTIONS:
        (copy / name).write_text(reduced(name, (copy / name).read_text()))
    if bug is None:
        return driver.build("quick", copy, jobs=1)
    path = copy / bug.file
    text = path.read_text()
    path.write_text(bug.edit(text))
    changed = "completion_cuda.cu" if bug.file.startswith("completion") else "three_factor_cuda.cu"
    return driver.build(bug.flavour, copy, changed, jobs=1)


def _runs() -> dict[str, list[CompletionRun | ThreeFactorRun]]:
    half = HALVES[1]
    three: list[CompletionRun | ThreeFactorRun] = [
        ThreeFactorRun(ThreeFactorCase(130, 72, 264, 7, depth=2, dropout_p=0.1, **half)),  # dy read once
        ThreeFactorRun(ThreeFactorCase(33, 776, 72, 16, depth=3, dropout_p=0.1, **half)),
        ThreeFactorRun(ThreeFactorCase(33, 776, 72, 40, depth=1, **half)),
        ThreeFactorRun(ThreeFactorCase(65, 100, 71, 20, depth=3, dropout_p=0.1)),
    ]
    completion: list[CompletionRun | ThreeFactorRun] = []
    for k in (3, 40, 130):
        case = CompletionCase(24, 31, k, 200, depth=None, weights=True, biases=True, pattern="gaps", dtype=torch.float32)
        completion += [CompletionRun(case, "rows", long_row=7), CompletionRun(case, "columns")]
    return {"three_factor": three, "completion": completion}


RUNS = _runs()


def runs_of(bug: Bug) -> Sequence[CompletionRun | ThreeFactorRun]:
    return RUNS[bug.name.split("-")[0]]


def _means(text: str, patterns: dict[str, str]) -> set[str]:
    return {name for name, pattern in patterns.items() if re.search(pattern, text)}


def catch(binary: Path, runs: Sequence[CompletionRun | ThreeFactorRun], flavour: str, means: str = "") -> tuple[set[str], str]:
    """The means that see something wrong, up to the one that is asked for, and what they say."""
    seen: set[str] = set()
    messages = []
    calls = [run.call() for run in runs]
    first: driver.Results | None = None
    for schedule in ("ahead", "forward", "reverse", "random") if flavour == "quick" else ("ahead",):
        if means in seen:
            break
        try:
            results = driver.run(binary, calls, schedule)
        except driver.Failure as failure:
            seen |= _means(failure.stderr, REPORTS) or {"unknown report"}
            messages.append(f"{schedule}: {failure}")
            continue
        for run in runs:
            try:
                run.check(results.outputs[str(run)])
            except AssertionError as error:
                seen |= _means(str(error), CHECKS) or {"unknown check"}
                messages.append(f"{schedule}: {error}")
        if first and driver.differences(first, results):
            seen.add("schedules")
        first = first or results
    return seen, "\n".join(messages)

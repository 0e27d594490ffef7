"""The paper's figures, and those of its neighbours, made again: ``lowrank-kernels figures [NAMES] --out FOLDER``.

A figure is a function from a :class:`Request` to a :class:`Made`: the numbers as columns, the picture, and a caption that says
settings, seeds and what agrees with the source. :mod:`.matrices` has those of matrix factorization, :mod:`.networks` those of
trained networks, :mod:`.adaptation` that of a language model. A new one is one more entry of :data:`FIGURES`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import InputError, OutputError, extra, write_atomically, write_table
from . import adaptation, matrices, networks
from .drawing import Made, Request


@dataclass(frozen=True)
class Figure:
    """A figure that can be made, with what it is and how long it takes on two CPU cores."""

    name: str
    source: str
    shows: str
    build: Callable[[Request], Made]
    minutes: float  # of the full settings
    measured: bool = True  # or estimated from the steps and the products of a step
    missing: Callable[[Request], str | None] = lambda request: None  # why it cannot be made of this request


PAPER, LORAPLUS, OVERVIEW = "arXiv:2406.04112", "arXiv:2402.12354", "arXiv:2503.19859"
FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure(
            "depth", f"{PAPER}, Fig. 2", "completion by two and by three factors, over their width", matrices.depth, 10, False
        ),
        Figure("spectrum", f"{PAPER}, Fig. 3", "what moves in a layer, and what does not", matrices.spectrum, 0.04),
        Figure("trajectory", f"{PAPER}, Fig. 4", "a factorization and its compressed twin", matrices.trajectory, 80),
        Figure("completion", f"{PAPER}, Fig. 5", "completion: full width, gamma = 0, gamma = 0.01", matrices.completion, 66),
        Figure("narrow", f"{PAPER}, Fig. 10 left", "compressed against random narrow factors", matrices.narrow, 90, False),
        Figure("nonlinear", f"{PAPER}, Fig. 9", "gradients of a ReLU factorization at a small start", matrices.nonlinear, 0.04),
        Figure("rates", f"{LORAPLUS}, Fig. 2", "LoRA's two rates on a toy problem", networks.rates, 4),
        Figure(
            "dimension", "abstract, see the caption", "rank of the activations of random ReLU networks", networks.dimension, 0.1
        ),
        Figure(
            "adaptation",
            f"{PAPER}, Fig. 1",
            "updates of a fine-tuned language model, and their subspaces",
            adaptation.adaptation,
            26,
            missing=adaptation.missing,
        ),
        Figure("updates", f"{OVERVIEW}, Fig. 1", "singular values of a trained layer's update", networks.updates, 0.3),
        Figure("alignment", "abstract, see the caption", "SGD and the outlier eigenspaces", networks.alignment, 0.2),
    )
}


def check(names: Sequence[str], out: Path, request: Request) -> tuple[list[Figure], dict[str, str]]:
    """The figures of these names, without any all that can be made; and those that cannot, with the reason.

    Raises:
        InputError: an unknown name, or a named figure that cannot be made; OutputError: ``out`` is a file.
    """
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise InputError(f"figures: there is no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder")
    for module in ("matplotlib", "polars"):
        extra(module, "figures")
    chosen = [FIGURES[name] for name in dict.fromkeys(names)] or list(FIGURES.values())
    reasons = {figure.name: reason for figure in chosen if (reason := figure.missing(request)) is not None}
    for name in names:
        if name in reasons:
            raise InputError(f"figures: {name} cannot be made: {reasons[name]}")
    return [figure for figure in chosen if figure.name not in reasons], reasons


def make(figures: Sequence[Figure], out: Path, request: Request) -> Iterator[tuple[Figure, list[Path], str]]:
    """Make figures one after the other: ``NAME.png``, ``NAME.csv`` and ``NAME.md``, the caption; existing ones are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    for figure in figures:
        began = time.monotonic()
        made = figure.build(request)
        settings = "settings smaller than the source's" if made.reduced else "full settings, the source's where known"
        caption = (
            f"**{figure.shows}** ({figure.source}). {made.caption} Seed {request.seed}; {settings}; "
            f"{time.monotonic() - began:.0f} s on {threads} thread{'s' if threads > 1 else ''}.\n"
        )
        yield figure, _write(out / figure.name, made, caption), caption


def _write(stem: Path, made: Made, caption: str) -> list[Path]:
    paths = [stem.with_suffix(end) for end in (".png", ".csv", ".md")]
    write_atomically(paths[0], lambda handle: made.figure.savefig(handle, format="png", dpi=130), overwrite=True)
    write_table(paths[1], dict(made.columns), overwrite=True)
    write_atomically(paths[2], lambda handle: handle.write(caption.encode()), overwrite=True)
    return paths

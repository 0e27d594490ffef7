"""Checkpoints of a training whose rows are shared out over processes, read again by any number of them.

A folder holds a folder a step; each process writes its rows there, the first one what all share, and last the manifest, which
makes the step count. Tensors are safetensors files, the rest is JSON: nothing that is loaded is executed. The two newest steps
are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .entries import ObservedEntries
from .files import InputError, OutputError, PathLike, write_atomically
from .processes import agreed
from .row_shards import RowShard

FORMAT = "lowrank_kernels.checkpoint/1"
MANIFEST = "manifest.json"
KEPT = 2
ROWS_AT_ONCE = 1 << 16
ROUNDING = 1e-3  # of the numbers of a fingerprint; a value or weight is of the order of one
ALL_ROWS = "shared.safetensors"


class Checkpoints:
    """A folder of checkpoints for :func:`lowrank_kernels.solver.train`; all processes must see it.

    Args:
        folder: made where it is not there; a training that was begun in it goes on.
        shard: the rows that are here.
        identity: what a checkpoint must have been made with, by name: the data's fingerprint and the settings. Values that
            JSON can hold.
        every: steps between checkpoints, a multiple of the solver's ten.

    Raises:
        ValueError: ``every`` is not a multiple of ten; a process that has another folder, other data or settings.
        InputError: a checkpoint of another version, of other data or settings, or with files missing.
        OutputError: a folder that cannot be written; nothing half-written counts.
    """

    def __init__(self, folder: PathLike, shard: RowShard, identity: dict[str, Any], *, every: int = 50) -> None:
        if every < 1 or every % 10:
            raise ValueError(f"checkpoint_every must be a multiple of 10, the steps between checks, got {every}")
        self.folder, self.shard, self.every = Path(folder), shard, every
        self.identity = json.loads(json.dumps(identity, default=lambda value: value.item()))  # as it will be read; of numpy too
        agreed(shard.team, "checkpoint", {"folder": os.path.abspath(folder), **self.identity})
        with shard.team.together():
            if shard.team.rank == 0:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise OutputError(f"{self.folder}: the folder cannot be made: {error.strerror}") from error
            shard.team.meet(None)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise OutputError(f"{self.folder}: the folder is not there or not writable for process {shard.team.rank}")
            shard.team.meet(None)

    def load(self, rows: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fill the tensors from the newest whole step and give its scalars; None where there is none."""
        team, shard = self.shard.team, self.shard
        with team.together():
            newest = next(self._complete(), None)
            name = team.meet(None if newest is None else newest.parent.name)[0]  # the first process chooses
            if name is None:
                return None
            manifest = self._manifest(self.folder / name)
            self._check(self.folder / name, manifest)
            _fill(self.folder / name / ALL_ROWS, shared)
            for start, count in manifest["rows"]:
                low, high = max(start, shard.start), min(start + count, shard.start + shard.count)
                if low < high:
                    path = self.folder / name / _rows_file(start)
                    _fill(path, rows, slice(low - start, high - start), slice(low - shard.start, high - shard.start))
            team.meet(None)
        scalars: dict[str, Any] = manifest["scalars"]
        return scalars

    def save(self, step: int, rows: dict[str, Tensor], shared: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Write one step, whole or not at all, and drop those before the last two."""
        team, shard, target = self.shard.team, self.shard, self.folder / f"step-{step:08d}"
        with team.together():
            if team.rank == 0:
                if target.exists():  # of a run that ended while it wrote
                    shutil.rmtree(target)
                try:
                    target.mkdir()
                except OSError as error:
                    raise OutputError(f"{target}: the folder cannot be made: {error.strerror}") from error
            team.meet(None)
            if shard.count:  # without rows it starts where another one does
                _write(target / _rows_file(shard.start), rows)
            if team.rank == 0:
                _write(target / ALL_ROWS, shared)
            held = team.meet((shard.start, shard.count))  # everything is on the disk
            if team.rank == 0:
                manifest = {
                    "format": FORMAT,
                    "identity": self.identity,
                    "total_rows": shard.total,
                    "rows": [each for each in held if each[1]],
                    "scalars": scalars,
                }
                text = json.dumps(manifest, indent=1).encode()
                write_atomically(target / MANIFEST, lambda handle: handle.write(text))
                for old in list(self._complete())[KEPT:]:
                    shutil.rmtree(old.parent, ignore_errors=True)
            team.meet(None)

    def _complete(self) -> Iterator[Path]:
        """The manifests of the whole steps, newest first."""
        return iter(sorted(self.folder.glob(f"step-*/{MANIFEST}"), reverse=True))

    def _manifest(self, folder: Path) -> dict[str, Any]:
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            found = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is not the manifest of a checkpoint: {error}; remove {folder}") from error
        if found != FORMAT:
            raise InputError(
                f"{path}: is of version {found!r}, this package reads {FORMAT!r}; use another folder, or the version of the "
                "package that wrote it"
            )
        return manifest

    def _check(self, folder: Path, manifest: dict[str, Any]) -> None:
        had = manifest["identity"]
        for name in sorted({*had, *self.identity}):
            if not _same(name, had.get(name), self.identity.get(name)):
                raise InputError(
                    f"{folder}: was made with {name} = {had.get(name)!r}, this training has {self.identity.get(name)!r}; "
                    "use the same data and settings to go on, or another folder to begin anew"
                )
        if manifest["total_rows"] != self.shard.total:
            raise InputError(f"{folder}: has {manifest['total_rows']} rows, this training has {self.shard.total}")
        edge = 0
        for start, count in manifest["rows"]:
            if start != edge:
                raise InputError(f"{folder}: rows from {edge} on are missing; remove {folder} to go on from an older one")
            edge = start + count


def fingerprint(entries: ObservedEntries, shard: RowShard) -> dict[str, Any]:
    """What data a training has, whatever process holds it.

    Of the places their number and a sum over their hashes; of the standardized values, and of the weights, the product with
    these hashes as numbers from -1 to 1: other values, or the same ones at other places, have another one. Numbers of
    processes differ in the rounding of mean and scale, which moves it by far less than :data:`ROUNDING`.
    """
    total, sums = torch.zeros((), dtype=torch.int64, device="cpu"), [0.0, 0.0]
    offsets, side = entries.by_row.offsets.cpu(), entries.by_row
    for begin in range(0, entries.shape[0], ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, entries.shape[0])
        counts, here = offsets[begin : end + 1].diff(), slice(int(offsets[begin]), int(offsets[end]))
        row = torch.repeat_interleave(torch.arange(begin, end, device="cpu") + shard.start, counts)
        mixed = row * 0x9E3779B97F4A7C1 + side.indices[here].cpu() * 0x2545F4914F6CDD1D
        mixed = (mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85
        mixed = mixed ^ (mixed >> 32)
        total += mixed.sum()
        for place, given in enumerate((side.values, side.weights)):
            if given is not None:
                sums[place] += float(torch.dot(mixed.double() / 2**63, given[here].cpu().double()))
    count, mixed_sum, values, weights = map(sum, zip(*shard.team.meet((len(entries), int(total), *sums)), strict=True))
    return {
        "entries": f"{count} of {shard.total} x {entries.shape[1]}, {mixed_sum % 2**64:016x}",
        "values": values,
        "weights": None if side.weights is None else weights,
    }


def _same(name: str, had: Any, own: Any) -> bool:
    close = name in ("values", "weights") and isinstance(had, float) and isinstance(own, float)
    return abs(had - own) < ROUNDING if close else bool(had == own)


def _rows_file(start: int) -> str:
    return f"rows-{start:012d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: could not be written: {error}; this step does not count, those before are kept") from error


def _fill(path: Path, tensors: dict[str, Tensor], source: slice = slice(None), target: slice = slice(None)) -> None:
    """Copy tensors of a file, or rows of them, into tensors that are there."""
    try:
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                part = file.get_slice(name)[source]
                if tensor[target].shape != part.shape or tensor.dtype != part.dtype:
                    raise InputError(
                        f"{path}: {name} must be {tensor.dtype} of shape {tuple(tensor[target].shape)}, "
                        f"got {part.dtype} of shape {tuple(part.shape)}"
                    )
                tensor[target] = part
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}; remove its folder to go on from the checkpoint before") from error

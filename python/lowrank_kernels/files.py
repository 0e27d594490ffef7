"""What all readers and writers share: errors of one line, optional libraries, files written whole or not at all.

Every refusal of a file is an :class:`InputError` whose one line says file, line, column, what was wanted and what came.
Writers go through :func:`write_atomically`: a temporary file in the same folder, synced, then renamed, so a full disk or a
crash leaves the old file or none. The libraries behind the formats are extras and are imported where they are used.
"""

from __future__ import annotations

import importlib
import io
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PathLike = str | os.PathLike[str]


class InputError(ValueError):
    """A file that cannot be read as asked; the message is one line for the user."""


class OutputError(OSError):
    """A file that could not be written; nothing half-written was left behind."""


class MissingExtra(ImportError):
    """A library of an optional extra is not installed."""


class Dense(NamedTuple):
    """A dense matrix whose missing cells are NaN."""

    values: NDArray[np.float64]  # (m, n)
    columns: list[str] | None = None  # (n,) header, where the file has one
    labels: dict[str, list[str]] | None = None  # leading text columns: name -> (m,) cells, written back unchanged


def as_held(dtype: Any, number: float) -> float:
    """A number as an array, or a column, of the dtype holds it: float32 has no -99.9."""
    name = str(dtype).lower()
    return float(np.dtype(name).type(number)) if name in ("float16", "float32") else number


def pip_install(name: str = "all") -> str:
    """The command that installs an extra; the package index may not have this package yet, a checkout does."""
    return f'pip install lowrank-kernels[{name}], or in a checkout pip install ".[{name}]"'


def extra(module: str, purpose: str) -> Any:
    """Import ``module``, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{purpose} needs {module.split('.')[0]}: {pip_install()}") from error


def read_head(path: PathLike, count: int | None = 16) -> bytes:
    """The first ``count`` bytes, or all of them, of a file that exists and is not empty."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(count)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a file was wanted, this is a folder") from None
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror or error}") from error
    if not head:
        raise InputError(f"{path}: the file is empty")
    return head


# ---------------------------------------------------------------------- writers


def check_output(path: PathLike, overwrite: bool = False, suffixes: Sequence[str] | None = None) -> None:
    """Refuse early, before the long work: an unknown extension, a missing folder, an existing file."""
    target = Path(path)
    if suffixes is not None and target.suffix.lower() not in suffixes:
        raise InputError(f"{path}: can be written as {', '.join(suffixes)}, got extension {target.suffix!r}")
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} is not there; make it first: mkdir -p {folder}")
    if target.exists():
        if not target.is_file():
            raise OutputError(f"{path}: exists and is not a regular file")
        if not overwrite:
            raise OutputError(f"{path}: exists already; pass --overwrite (overwrite=True) to replace it")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable")


def write_atomically(path: PathLike, writer: Callable[[BinaryIO], object], overwrite: bool = False) -> None:
    """Write a whole file or none: ``writer`` fills a temporary file beside ``path``, which is synced and renamed.

    Without ``overwrite`` an existing file is never replaced, also when it appears meanwhile. On any failure, a full disk
    and an interrupt included, the temporary file is removed and the old file is as it was.

    Raises:
        OutputError: with the system's reason.
    """
    check_output(path, overwrite)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as handle:
            writer(handle)
            handle.flush()
            os.fsync(handle.fileno())
        if overwrite:
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o7777)
            os.replace(temporary, target)
        else:
            _rename_new(temporary, target)
    except FileExistsError as error:
        raise OutputError(f"{path}: exists already; pass --overwrite (overwrite=True) to replace it") from error
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # the rename itself reaches the disk; some file systems cannot do this
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename that fails where the target exists: a hard link does, a rename would replace it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(str(target)) from None
        os.rename(temporary, target)


def _whole(fill: Callable[[BinaryIO], object]) -> Callable[[BinaryIO], object]:
    """Serialize in memory, then write: polars and NumPy hide the system's reason when their own writing fails."""

    def write(handle: BinaryIO) -> None:
        buffer = io.BytesIO()
        fill(buffer)
        handle.write(buffer.getbuffer())

    return write


def write_table(path: PathLike, columns: dict[str, Any], overwrite: bool = False) -> None:
    """Write named columns as .csv, .tsv or .parquet."""
    check_output(path, overwrite, (".csv", ".tsv", ".parquet"))
    frame = extra("polars", "writing tables").DataFrame({name: np.asarray(column) for name, column in columns.items()})
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        write_atomically(path, _whole(frame.write_parquet), overwrite)
    else:
        separator = "\t" if suffix == ".tsv" else ","
        write_atomically(path, _whole(lambda handle: frame.write_csv(handle, separator=separator)), overwrite)


def write_arrays(path: PathLike, arrays: dict[str, Any], overwrite: bool = False) -> None:
    """Write named arrays, such as the factors, as .npz without pickles."""
    check_output(path, overwrite, (".npz",))
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.kind == "O":
            plain[name] = array.astype(str)
    write_atomically(path, lambda handle: np.savez_compressed(handle, **plain), overwrite)  # type: ignore[arg-type]


def write_dense(path: PathLike, dense: Dense, overwrite: bool = False) -> None:
    """Write a dense matrix as .npy, or as .csv or .tsv with the header and label columns it was read with."""
    check_output(path, overwrite, (".csv", ".tsv", ".npy"))
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        write_atomically(path, _whole(lambda handle: np.save(handle, dense.values, allow_pickle=False)), overwrite)
        return
    polars = extra("polars", "writing CSV")
    first = len(dense.labels or {}) + 1  # labels of a file without a header are columns 1, 2, ...
    names = dense.columns or [f"column {j + first}" for j in range(dense.values.shape[1])]
    frame = polars.DataFrame({**(dense.labels or {}), **dict(zip(names, dense.values.T, strict=True))}).fill_nan(None)
    separator, header = "\t" if suffix == ".tsv" else ",", dense.columns is not None
    write_atomically(
        path, _whole(lambda handle: frame.write_csv(handle, separator=separator, include_header=header)), overwrite
    )

"""Row and column labels, values and weights as users give them: checked, and turned into codes.

A label is a number or a string; its code is its position among the sorted labels seen in ``fit``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .processes import Team


def two_columns(method: str, pairs: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    wanted = "an (entries, 2) array of row and column labels or a tuple of two label arrays"
    if isinstance(pairs, tuple) and len(pairs) == 2:
        row, col = as_labels(pairs[0]), as_labels(pairs[1])
    elif hasattr(pairs, "iloc") or hasattr(pairs, "get_columns"):  # pandas, polars: each column keeps its own type
        if pairs.shape[1] != 2:
            raise ValueError(f"DeepMatrixCompletion.{method}: pairs must have 2 columns (row, column), got {pairs.shape[1]}")
        columns = [pairs.iloc[:, 0], pairs.iloc[:, 1]] if hasattr(pairs, "iloc") else pairs.get_columns()
        row, col = (column.to_numpy() for column in columns)
    else:
        array = as_labels(pairs)
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f"DeepMatrixCompletion.{method}: pairs must be {wanted}, got shape {array.shape}")
        row, col = array[:, 0], array[:, 1]
    if row.ndim != 1 or row.shape != col.shape:
        raise ValueError(
            f"DeepMatrixCompletion.{method}: row and column labels must be 1-D and of one length, "
            f"got {row.shape} and {col.shape}; pairs is {wanted}"
        )
    return row, col


def frame_names(pairs: Any) -> NDArray[np.object_] | None:
    """The names of a data frame's columns, where all are strings, as scikit-learn has them."""
    names = list(getattr(pairs, "columns", ())) if hasattr(pairs, "iloc") or hasattr(pairs, "get_columns") else []
    return np.array(names, dtype=object) if names and all(isinstance(name, str) for name in names) else None


def refuse_other_names(method: str, known: NDArray[np.object_] | None, pairs: Any) -> None:
    names = frame_names(pairs)
    if known is not None and names is not None and list(names) != list(known):
        raise ValueError(
            f"DeepMatrixCompletion.{method}: the columns must be {', '.join(known)} as in fit, got {', '.join(names)}; "
            "choose them in this order"
        )


def as_labels(given: Any) -> NDArray[Any]:
    """An array; one of mixed Python objects keeps them, where numpy would turn numbers beside strings into strings."""
    if isinstance(given, torch.Tensor):
        return given.detach().cpu().numpy()
    try:
        array = np.asarray(given)
    except ValueError as error:  # ragged
        raise ValueError(f"DeepMatrixCompletion: pairs must be an (entries, 2) array or a tuple of two: {error}") from error
    return np.asarray(given, dtype=object) if array.dtype.kind in "US" and not hasattr(given, "dtype") else array


def refuse_missing(method: str, side: str, labels: NDArray[Any]) -> NDArray[Any]:
    if len(labels) == 0:
        raise ValueError(f"DeepMatrixCompletion.{method}: pairs is empty; at least one observed entry is needed")
    bare = plain(labels)
    if bare.dtype.kind == "f":
        bad = ~np.isfinite(bare)
    elif bare.dtype.kind in "mM":
        bad = np.isnat(bare)
    elif bare.dtype.kind == "O":
        bad = np.array([x is None or x != x for x in bare])
    else:
        return labels
    if bad.any():
        raise ValueError(
            f"DeepMatrixCompletion.{method}: {side} labels must not be missing, NaN or infinite, "
            f"got {bare[bad.argmax()]} at position {int(bad.argmax())} ({int(bad.sum())} such positions)"
        )
    return labels


def unique_labels(side: str, labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = plain(refuse_missing("fit", side, labels))
    try:
        unique, codes = np.unique(labels, return_inverse=True)
    except TypeError as error:
        kinds = sorted({type(x).__name__ for x in labels})
        raise TypeError(
            f"DeepMatrixCompletion.fit: {side} labels must all be of one kind, numbers or strings, got {' and '.join(kinds)}; "
            "convert them, for example with str()"
        ) from error
    return unique, codes


def team_labels(team: Team, row: NDArray[Any], col: NDArray[Any]) -> NDArray[Any]:
    """The sorted column labels of all processes, given the unique row and column labels of each; a row belongs to one."""
    said = team.meet((row, col))
    for side, given in zip(("row", "column"), zip(*said, strict=True), strict=True):
        present = [labels for labels in given if len(labels)]
        if not present:
            raise ValueError("DeepMatrixCompletion.fit: pairs is empty in every process; at least one observed entry is needed")
        for labels in present[1:]:
            refuse_other_kind(side, present[0], labels)
    rows = np.concatenate([labels for labels, _ in said if len(labels)])
    owners = np.concatenate([np.full(len(labels), rank) for rank, (labels, _) in enumerate(said)])
    unique, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        label = unique[(counts > 1).argmax()]
        at = np.flatnonzero(rows == label)
        raise ValueError(
            f"DeepMatrixCompletion.fit: {int((counts > 1).sum())} row labels are given by several processes, the first, "
            f"{label}, by processes {owners[at[0]]} and {owners[at[1]]}; give all entries of a row to one process, "
            "or use fit_parts()"
        )
    return np.unique(np.concatenate([labels for _, labels in said if len(labels)]))


def plain(labels: NDArray[Any]) -> NDArray[Any]:
    """Object arrays of strings or of numbers as arrays of that type, small unsigned integers as signed ones."""
    if labels.dtype.kind == "u" and (labels.dtype.itemsize < 8 or not len(labels) or labels.max() < 2**63):
        return labels.astype(np.int64)
    if labels.dtype.kind == "T":  # numpy's variable-width strings
        return labels.astype(str)
    if labels.dtype.kind != "O":
        return labels
    kinds: tuple[tuple[tuple[type, ...], type], ...]
    kinds = (((str,), str), ((bytes,), bytes), ((int, np.integer), np.int64), ((int, float, np.number), np.float64))
    for classes, dtype in kinds:
        if all(isinstance(x, classes) for x in labels):
            try:
                return labels.astype(dtype)
            except OverflowError:  # integers beyond 64 bits stay objects
                return labels
    return labels


_PLURALS = {"number": "numbers", "string": "strings", "bytes": "bytes", "object": "other objects"}


def refuse_other_kind(side: str, known: NDArray[Any], given: NDArray[Any]) -> None:
    kinds = {"b": "number", "i": "number", "u": "number", "f": "number", "U": "string", "S": "bytes"}
    known_kind, given_kind = kinds.get(known.dtype.kind, "object"), kinds.get(plain(given).dtype.kind, "object")
    if len(given) and known_kind != given_kind:
        raise TypeError(
            f"DeepMatrixCompletion: {side} labels must be {_PLURALS[known_kind]} as in fit, got {_PLURALS[given_kind]}; "
            "unequal types never match, so every label would count as unseen"
        )


def label_codes(side: str, known: NDArray[Any], given: NDArray[Any]) -> NDArray[np.int64]:
    """Positions in ``known`` (sorted), -1 for unseen labels."""
    refuse_other_kind(side, known, given)
    given = plain(given)
    at = np.searchsorted(known, given).clip(0, len(known) - 1)
    return np.where(known[at] == given, at, -1)


def checked_values(
    method: str, y: ArrayLike, weight: ArrayLike | None, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    arrays: list[NDArray[np.float64] | None] = []
    for name, given in (("y", y), ("sample_weight", weight)):
        if given is None:
            arrays.append(None)
            continue
        if isinstance(given, torch.Tensor):
            given = given.detach().cpu().double().numpy()
        try:
            array = np.asarray(given)
            if array.dtype.kind in "cUSMm":
                raise TypeError(f"got {array.dtype}")
            array = array.astype(np.float64, copy=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"DeepMatrixCompletion.{method}: {name} must hold numbers: {error}") from error
        if array.shape != (count,):
            raise ValueError(f"DeepMatrixCompletion.{method}: {name} must have shape ({count},) like pairs, got {array.shape}")
        bad = ~np.isfinite(array) | (array < 0 if name == "sample_weight" else False)
        if bad.any():
            wanted = "finite" if name == "y" else "finite and not negative"
            first = int(bad.argmax())
            raise ValueError(
                f"DeepMatrixCompletion.{method}: {name} must be {wanted}, got {array[first]} at position {first} "
                f"({int(bad.sum())} such positions)"
            )
        arrays.append(array)
    if arrays[1] is not None and not arrays[1].any():
        raise ValueError(f"DeepMatrixCompletion.{method}: sample_weight must not be 0 everywhere")
    assert arrays[0] is not None
    return arrays[0], arrays[1]


def or_ones(weight: NDArray[Any] | None, count: int) -> NDArray[Any]:
    return np.ones(count) if weight is None else weight

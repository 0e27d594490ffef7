"""Matrix completion in scikit-learn's conventions: :class:`DeepMatrixCompletion` for (row, column, value) data.

The model is ``left @ core[L-1] ... core[0] @ right + b_i + c_j + mu``, started by the paper's compression and trained by
:func:`lowrank_kernels.solver.train`. Needs scikit-learn (``pip install lowrank-kernels[estimators]``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from . import solver
from .entries import ObservedEntries
from .files import extra, write_arrays

extra("sklearn", "the estimators")

from sklearn.base import BaseEstimator, RegressorMixin  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.validation import check_is_fitted  # noqa: E402

FORMAT = "lowrank_kernels.DeepMatrixCompletion/1"
PREDICT_BLOCK = 1 << 16  # pairs gathered at a time: 2 x 65536 x rank numbers


class DeepMatrixCompletion(RegressorMixin, BaseEstimator):
    r"""Complete a matrix from observed (row, column, value) entries with a compressed deep factorization.

    .. math:: \hat m_{ij} = \langle left_i, core_{L-1} \cdots core_0\, right_{:,j} \rangle + b_i + c_j + \mu

    Rows and columns are labels (integers or strings), in any order; those not seen in ``fit`` are predicted from the biases.

    Args:
        rank: inner width k, even; ``"auto"`` is 32, or less where the matrix is smaller. With the default regularization
            the rank needs no tuning: columns that the data does not support shrink to nothing.
        depth: number L of k x k cores.
        max_steps: steps of the solver, over which its step size falls to 1 %.
        learning_rate: Adam's rate for the outer factors of the standardised problem.
        regularization: ``"auto"`` estimates the strength for every factor entry, and the noise of every row and column,
            from the data; a pair ``(constant, per_observation)`` of numbers penalises
            ``(constant + per_observation * n_i) / 2 * |row i of left C|^2``, and the columns alike.
        noise_weights: with ``"auto"``: weigh rows and columns by their estimated noise.
        fit_bias: fit b_i and c_j.
        early_stopping: hold ``validation_fraction`` out, stop when its error no longer improves and keep the best model;
            ``"auto"`` does so with a fixed regularization only (with ``"auto"`` strengths the validation error stays flat
            at the end, and the entries are better used for fitting).
        validation_fraction: share of the entries held out by early stopping.
        patience: checks (every 10 steps) without a better validation error before stopping.
        warm_start: ``fit`` starts from the factors of the previous ``fit`` where the labels are the same.
        device: torch device; default the CPU.
        dtype: ``"float32"`` or ``"float64"``.
        random_state: int, ``RandomState`` or None.
        progress: True for a progress bar (needs rich), or a callable ``progress(step, max_steps, record)``.

    Attributes:
        left_, core_, right_: ``(m, k)``, ``(L, k, k)`` and ``(k, n)`` arrays, in the units of y.
        row_bias_, col_bias_, offset_: biases and mean.
        row_labels_, col_labels_: sorted labels of the rows and columns.
        status_: a :class:`lowrank_kernels.solver.Status`; ``status_.message`` says what to do next.
        history_: a dict a check: ``step``, ``train_rmse``, ``validation_rmse`` (where held out), ``seconds``.
        n_steps_: steps made.

    Example:
        >>> import numpy as np
        >>> from lowrank_kernels import DeepMatrixCompletion
        >>> rng = np.random.default_rng(0)
        >>> truth = np.outer(rng.normal(size=60), rng.normal(size=50))
        >>> row, col = (rng.random((60, 50)) < 0.5).nonzero()
        >>> model = DeepMatrixCompletion(random_state=0).fit((row, col), truth[row, col])
        >>> bool(abs(model.predict([[3, 4]]) - truth[3, 4]) < 0.05)
        True

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 3.
    """

    def __init__(
        self,
        rank: int | str = "auto",
        depth: int = 3,
        *,
        max_steps: int = 300,
        learning_rate: float = 0.03,
        regularization: str | tuple[float, float] = "auto",
        noise_weights: bool = True,
        fit_bias: bool = True,
        early_stopping: bool | str = "auto",
        validation_fraction: float = 0.1,
        patience: int = 5,
        warm_start: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        random_state: Any = None,
        progress: bool | Callable[[int, int, dict[str, float]], None] = False,
    ) -> None:
        self.rank = rank
        self.depth = depth
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.regularization = regularization
        self.noise_weights = noise_weights
        self.fit_bias = fit_bias
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.progress = progress

    # ------------------------------------------------------------------ fitting

    def fit(self, pairs: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> DeepMatrixCompletion:
        """Fit on the observed entries.

        Args:
            pairs: ``(Z, 2)`` array of row and column labels (a data frame too), or a tuple of two ``(Z,)`` label arrays.
            y: ``(Z,)`` finite values.
            sample_weight: ``(Z,)`` non-negative weights of the squared errors.

        Entries given several times are averaged, with a warning. Ctrl-C ends the training with the best factors so far and
        ``status_`` INTERRUPTED.
        """
        self._check_parameters()
        row, col = _two_columns("fit", pairs)
        row_labels, row_codes = _unique("row", row)
        col_labels, col_codes = _unique("column", col)
        keep = self.warm_start and hasattr(self, "left_") and self._same_labels(row_labels, col_labels)
        self.row_labels_, self.col_labels_ = row_labels, col_labels
        self._keep_entries(row_codes, col_codes, y, sample_weight)
        return self._train(warm=keep, max_steps=self.max_steps)

    def partial_fit(self, pairs: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> DeepMatrixCompletion:
        """Add entries, and with them new rows and columns; only the new ones need to be given.

        An entry that was known is replaced. Training continues from the current factors for a third of ``max_steps``.
        """
        if not hasattr(self, "left_"):
            return self.fit(pairs, y, sample_weight)
        self._check_parameters()
        row, col = _two_columns("partial_fit", pairs)
        values, weights = _values("partial_fit", y, sample_weight, len(row))
        old = self.entries_
        labels, codes = [], []
        for name, known, old_codes, given in (
            ("row", self.row_labels_, old["row"], row),
            ("column", self.col_labels_, old["col"], col),
        ):
            _same_kind(name, known, given)
            merged, positions = np.unique(np.concatenate([known, given]), return_inverse=True)
            labels.append(merged)
            codes.append(np.concatenate([positions[: len(known)][old_codes], positions[len(known) :]]))
        both_weights = None
        if old["weight"] is not None or weights is not None:
            both_weights = np.concatenate([_or_ones(old["weight"], len(old["value"])), _or_ones(weights, len(values))])
        self._spread_factors(np.searchsorted(labels[0], self.row_labels_), np.searchsorted(labels[1], self.col_labels_), labels)
        self.row_labels_, self.col_labels_ = labels
        self._keep_entries(codes[0], codes[1], np.concatenate([old["value"], values]), both_weights, duplicates="last")
        return self._train(warm=True, max_steps=max(1, self.max_steps // 3))

    def _keep_entries(
        self, row: NDArray[Any], col: NDArray[Any], y: ArrayLike, weight: ArrayLike | None, duplicates: str = "mean"
    ) -> None:
        """Validate and store the training entries, one a pair."""
        values, weights = _values("fit", y, weight, len(row))
        entries = ObservedEntries.from_coo(
            row,
            col,
            values,
            shape=(len(self.row_labels_), len(self.col_labels_)),
            weights=weights,
            duplicates=duplicates,
            dtype=torch.float64,
        )
        repeated = len(values) - len(entries)
        if repeated and duplicates == "mean":
            warnings.warn(
                f"DeepMatrixCompletion: {repeated} of {len(values)} entries repeat a (row, column) pair; their values are "
                "averaged. Remove the repetitions to silence this.",
                UserWarning,
                stacklevel=3,
            )
        sorted_row, sorted_col, sorted_values, sorted_weights = entries.coo()
        self.entries_: dict[str, Any] = {
            "row": sorted_row.numpy().astype(np.int32 if entries.shape[0] < 2**31 else np.int64),
            "col": sorted_col.numpy().astype(np.int32 if entries.shape[1] < 2**31 else np.int64),
            "value": sorted_values.numpy(),
            "weight": None if sorted_weights is None else sorted_weights.numpy(),
        }

    def _train(self, *, warm: bool, max_steps: int) -> DeepMatrixCompletion:
        known, dtype = self.entries_, getattr(torch, self.dtype)
        shape = (len(self.row_labels_), len(self.col_labels_))
        weight = known["weight"]
        offset = float(np.average(known["value"], weights=weight))
        scale = float(np.sqrt(np.average((known["value"] - offset) ** 2, weights=weight)))
        if scale <= 1e-12 * max(abs(offset), 1e-300):
            scale = 1.0  # constant values
        entries = ObservedEntries.from_coo(
            known["row"],
            known["col"],
            (known["value"] - offset) / scale,
            shape=shape,
            weights=None if weight is None else weight * (len(weight) / weight.sum()),
            dtype=dtype,
            device=self.device,
        )
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31)))
        validation = None
        stopping = self.regularization != "auto" if self.early_stopping == "auto" else self.early_stopping
        if stopping:
            held = torch.rand(len(entries), generator=generator).to(entries.device) < self.validation_fraction
            if 0 < int(held.sum()) < len(entries):
                entries, validation = entries.select(~held), entries.select(held)
        rank = self._rank(shape)
        if warm:
            model = self._current_model(offset, scale, entries)
        else:
            bias = {"row_bias": self.fit_bias, "col_bias": self.fit_bias}
            model = solver.start(entries, rank, depth=self.depth, generator=generator, **bias)
        pair = None if self.regularization == "auto" else (float(self.regularization[0]), float(self.regularization[1]))
        options = solver.TrainOptions(
            max_steps=max_steps,
            learning_rate=self.learning_rate,
            regularization="auto" if pair is None else (pair, pair),
            noise_weights=self.noise_weights,
            row_bias=self.fit_bias,
            col_bias=self.fit_bias,
            patience=self.patience,
            warm=warm,
        )
        with progress_callback(self.progress, max_steps, scale) as callback:
            result = solver.train(model, entries, options, validation=validation, callback=callback)
        self.left_ = model.left.cpu().numpy()
        self.core_ = model.core.cpu().numpy()
        self.right_ = (scale * model.columns).cpu().numpy().T
        self.row_bias_ = (scale * model.row_bias).cpu().numpy()
        self.col_bias_ = (scale * model.col_bias).cpu().numpy()
        self.offset_ = offset
        self.status_ = result.status
        self.history_ = [_in_units(record, scale) for record in result.history]
        self.n_steps_ = result.steps
        self.n_features_in_ = 2
        if result.status is solver.Status.DIVERGED:
            warnings.warn(f"DeepMatrixCompletion: {result.status.message}", UserWarning, stacklevel=3)
        return self

    def _current_model(self, offset: float, scale: float, entries: ObservedEntries) -> solver.CompletionModel:
        """The fitted factors as a start, in standardised units; the change of the mean goes into the column biases."""

        def tensor(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(entries.device, entries.dtype)

        shift = self.offset_ - offset
        return solver.CompletionModel(
            tensor(self.left_),
            tensor(self.core_),
            tensor(self.right_.T) / scale,
            tensor(self.row_bias_) / scale,
            (tensor(self.col_bias_) + shift) / scale,
        )

    def _spread_factors(self, rows: NDArray[Any], cols: NDArray[Any], labels: list[NDArray[Any]]) -> None:
        """Move factors and biases to their new places; new rows and columns start at zero."""

        def spread(array: NDArray[Any], at: NDArray[Any], count: int, axis: int = 0) -> NDArray[Any]:
            shape = list(array.shape)
            shape[axis] = count
            moved = np.zeros(shape, array.dtype)
            moved[(slice(None),) * axis + (at,)] = array
            return moved

        self.left_ = spread(self.left_, rows, len(labels[0]))
        self.right_ = spread(self.right_, cols, len(labels[1]), axis=1)
        self.row_bias_ = spread(self.row_bias_, rows, len(labels[0]))
        self.col_bias_ = spread(self.col_bias_, cols, len(labels[1]))

    # ------------------------------------------------------------------ prediction

    def predict(self, pairs: Any) -> NDArray[Any]:
        """``(P,)`` predicted values; rows and columns unseen in ``fit`` count with their other side's bias only."""
        check_is_fitted(self)
        row, col = _two_columns("predict", pairs)
        i, j = _codes("row", self.row_labels_, row), _codes("column", self.col_labels_, col)
        effective = self._effective_left()
        out = np.full(len(i), self.offset_, dtype=self.row_bias_.dtype)
        out += np.where(i >= 0, self.row_bias_[i], 0) + np.where(j >= 0, self.col_bias_[j], 0)
        columns = np.ascontiguousarray(self.right_.T)
        for begin in range(0, len(i), PREDICT_BLOCK):
            block = slice(begin, begin + PREDICT_BLOCK)
            both = (i[block] >= 0) & (j[block] >= 0)
            out[block] += np.where(both, np.einsum("pk,pk->p", effective[i[block]], columns[j[block]]), 0)
        return out

    def recommend(self, row: Any, n: int = 10, *, exclude_seen: bool = True) -> tuple[NDArray[Any], NDArray[Any]]:
        """``(labels, scores)`` of the n columns with the highest predictions for a row, best first.

        Columns observed for the row in ``fit`` are left out unless ``exclude_seen=False``; an unseen row gets the columns
        with the highest biases.
        """
        check_is_fitted(self)
        if n < 1:
            raise ValueError(f"DeepMatrixCompletion.recommend: n must be at least 1, got {n}")
        i = int(_codes("row", self.row_labels_, np.asarray([row]))[0])
        scores = self.offset_ + self.col_bias_.astype(np.float64)
        if i >= 0:
            scores = scores + self.row_bias_[i] + self._effective_left()[i] @ self.right_
            if exclude_seen:
                scores[self.entries_["col"][self.entries_["row"] == i]] = -np.inf
        best = np.argsort(-scores, kind="stable")[:n]
        best = best[np.isfinite(scores[best])]
        return self.col_labels_[best], scores[best]

    def _effective_left(self) -> NDArray[Any]:
        left = self.left_
        for layer in self.core_[::-1]:
            left = left @ layer
        return left

    # ------------------------------------------------------------------ files

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the fitted estimator to an ``.npz`` file, atomically; it holds arrays and JSON only, nothing executable."""
        check_is_fitted(self)
        for name, labels in (("row", self.row_labels_), ("column", self.col_labels_)):
            if labels.dtype.kind not in "biufUS":
                raise TypeError(
                    f"DeepMatrixCompletion.save: {name} labels must be numbers or strings to be saved, got {labels.dtype}"
                )
        parameters = {k: v for k, v in self.get_params().items() if k not in ("progress", "random_state")}
        if isinstance(self.random_state, int):
            parameters["random_state"] = self.random_state
        header = {
            "format": FORMAT,
            "parameters": parameters,
            "offset": self.offset_,
            "status": self.status_.name,
            "n_steps": self.n_steps_,
            "history": self.history_,
        }
        arrays = {name: getattr(self, name) for name in _SAVED}
        entries = {f"entries_{k}": v for k, v in self.entries_.items() if v is not None}
        write_arrays(path, {"header": np.array(json.dumps(header)), **arrays, **entries}, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> DeepMatrixCompletion:
        """Read an estimator written by :meth:`save`; nothing from the file is executed."""
        try:
            with np.load(Path(path), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop("header")))
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, wanted {FORMAT!r}")
            parameters = header["parameters"]
            if isinstance(parameters.get("regularization"), list):
                parameters["regularization"] = tuple(parameters["regularization"])
            model = cls(**parameters)
            for name in _SAVED:
                setattr(model, name, arrays[name])
            model.entries_ = {k: arrays.get(f"entries_{k}") for k in ("row", "col", "value", "weight")}
            model.offset_, model.n_steps_, model.history_ = header["offset"], header["n_steps"], header["history"]
            model.status_ = solver.Status[header["status"]]
            model._check_loaded()
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"DeepMatrixCompletion.load: {path} is not a model saved by this class: {error}") from error
        model.n_features_in_ = 2
        return model

    def _check_loaded(self) -> None:
        m, n, k = len(self.row_labels_), len(self.col_labels_), self.left_.shape[1]
        wanted = {"left_": (m, k), "right_": (k, n), "row_bias_": (m,), "col_bias_": (n,)}
        for name, shape in {**wanted, "core_": (self.core_.shape[0], k, k)}.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")

    # ------------------------------------------------------------------ checks

    def _rank(self, shape: tuple[int, int]) -> int:
        largest = min(shape) // 2 * 2
        if self.rank == "auto":
            return min(32, largest)
        if self.rank > largest:  # type: ignore[operator]
            raise ValueError(
                f"DeepMatrixCompletion: rank must be at most {largest} for {shape[0]} rows and {shape[1]} columns, "
                f"got {self.rank}; use rank='auto'"
            )
        return int(self.rank)

    def _check_parameters(self) -> None:
        def refuse(name: str, wanted: str) -> None:
            raise ValueError(f"DeepMatrixCompletion: {name} must be {wanted}, got {getattr(self, name)!r}")

        integer = isinstance(self.rank, (int, np.integer)) and not isinstance(self.rank, bool)
        if self.rank != "auto" and not (integer and self.rank >= 2 and self.rank % 2 == 0):  # type: ignore[operator]
            refuse("rank", "'auto' or an even number of at least 2 (half of it are directions of the gradient)")
        if self.depth < 1:
            refuse("depth", "at least 1")
        if self.max_steps < 1:
            refuse("max_steps", "at least 1")
        if not self.learning_rate > 0:
            refuse("learning_rate", "positive")
        if self.regularization != "auto":
            pair = self.regularization
            if isinstance(pair, str) or np.shape(pair) != (2,) or not all(np.isfinite(x) and x >= 0 for x in pair):
                refuse("regularization", "'auto' or a pair (constant, per_observation) of non-negative numbers")
        if self.early_stopping not in (True, False, "auto"):
            refuse("early_stopping", "True, False or 'auto'")
        if not 0 < self.validation_fraction < 1:
            refuse("validation_fraction", "between 0 and 1")
        if self.dtype not in ("float32", "float64"):
            refuse("dtype", "'float32' or 'float64'")

    def _same_labels(self, rows: NDArray[Any], cols: NDArray[Any]) -> bool:
        same = np.array_equal(rows, self.row_labels_) and np.array_equal(cols, self.col_labels_)
        fits = self.left_.shape[1] == self._rank((len(rows), len(cols))) and self.core_.shape[0] == self.depth
        return bool(same and fits)


_SAVED = ("left_", "core_", "right_", "row_bias_", "col_bias_", "row_labels_", "col_labels_")


# ---------------------------------------------------------------------- helpers


def _two_columns(method: str, pairs: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    if isinstance(pairs, tuple) and len(pairs) == 2:
        row, col = np.asarray(pairs[0]), np.asarray(pairs[1])
    elif hasattr(pairs, "iloc"):  # a data frame: each column keeps its own type
        if pairs.shape[1] != 2:
            raise ValueError(f"DeepMatrixCompletion.{method}: pairs must have 2 columns (row, column), got {pairs.shape[1]}")
        row, col = pairs.iloc[:, 0].to_numpy(), pairs.iloc[:, 1].to_numpy()
    else:
        array = np.asarray(pairs)
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(
                f"DeepMatrixCompletion.{method}: pairs must be a (entries, 2) array of row and column labels or a tuple of two "
                f"label arrays, got shape {array.shape}"
            )
        row, col = array[:, 0], array[:, 1]
    if row.ndim != 1 or row.shape != col.shape:
        raise ValueError(
            f"DeepMatrixCompletion.{method}: row and column labels must be 1-D and of one length, "
            f"got {row.shape} and {col.shape}"
        )
    return row, col


def _unique(side: str, labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(labels) == 0:
        raise ValueError("DeepMatrixCompletion.fit: pairs is empty; at least one observed entry is needed")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError(f"DeepMatrixCompletion.fit: {side} labels must not be NaN or infinite")
    try:
        unique, codes = np.unique(_plain(labels), return_inverse=True)
    except TypeError as error:
        raise TypeError(
            f"DeepMatrixCompletion.fit: {side} labels must all be of one kind (numbers or strings): {error}"
        ) from error
    return unique, codes


def _plain(labels: NDArray[Any]) -> NDArray[Any]:
    """Object arrays of strings or of numbers as arrays of that type; others as they are."""
    if labels.dtype.kind != "O":
        return labels
    if all(isinstance(x, str) for x in labels):
        return labels.astype(str)
    if all(isinstance(x, (int, np.integer)) for x in labels):
        return labels.astype(np.int64)
    return labels


def _same_kind(side: str, known: NDArray[Any], given: NDArray[Any]) -> None:
    kinds = {"b": "number", "i": "number", "u": "number", "f": "number", "U": "string", "S": "bytes"}
    known_kind, given_kind = kinds.get(known.dtype.kind, "object"), kinds.get(_plain(given).dtype.kind, "object")
    if len(given) and known_kind != given_kind:
        raise TypeError(
            f"DeepMatrixCompletion: {side} labels must be {known_kind}s as in fit, got {given_kind}s; "
            "unequal types never match, so every label would count as unseen"
        )


def _codes(side: str, known: NDArray[Any], given: NDArray[Any]) -> NDArray[np.int64]:
    """Positions in ``known`` (sorted), -1 for unseen labels."""
    _same_kind(side, known, given)
    given = _plain(given)
    at = np.searchsorted(known, given).clip(0, len(known) - 1)
    return np.where(known[at] == given, at, -1)


def _values(
    method: str, y: ArrayLike, weight: ArrayLike | None, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    arrays: list[NDArray[np.float64] | None] = []
    for name, given in (("y", y), ("sample_weight", weight)):
        if given is None:
            arrays.append(None)
            continue
        try:
            array = np.asarray(given, dtype=np.float64)
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


def _or_ones(weight: NDArray[Any] | None, count: int) -> NDArray[Any]:
    return np.ones(count) if weight is None else weight


def _in_units(record: dict[str, float], scale: float) -> dict[str, float]:
    return {name: value * scale if name.endswith("_rmse") else value for name, value in record.items() if name != "loss"}


class progress_callback:
    """The callback of ``progress=``: none, the caller's, or a rich progress bar for as long as the training runs."""

    def __init__(self, wanted: bool | Callable[[int, int, dict[str, float]], None], max_steps: int, scale: float) -> None:
        self.wanted, self.max_steps, self.scale = wanted, max_steps, scale
        self.bar: Any = None

    def __enter__(self) -> Callable[[int, dict[str, float]], None] | None:
        report = self.wanted
        if report is False or report is None:
            return None
        if report is True:
            rich = extra("rich.progress", "a progress bar")
            columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), "{task.fields[error]}")
            self.bar = rich.Progress(*columns, rich.TimeElapsedColumn()).__enter__()
            task = self.bar.add_task("fit", total=self.max_steps, error="")

            def report(step: int, total: int, record: dict[str, float]) -> None:
                self.bar.update(task, completed=step, error=f"RMSE {record['train_rmse']:.4g}")

        return lambda step, record: report(step, self.max_steps, _in_units(record, self.scale))

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(*error)

"""Matrix completion in scikit-learn's conventions: :class:`DeepMatrixCompletion` for (row, column, value) data.

The model is ``left @ core[L-1] ... core[0] @ right + b_i + c_j + mu``, started by the paper's compression and trained by
:func:`lowrank_kernels.solver.train`. Needs scikit-learn (``pip install lowrank-kernels[estimators]``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

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

PREDICT_BLOCK = 1 << 16  # pairs gathered at a time: 2 x 65536 x rank numbers
FLOAT32_RANGE = (1e-30, 1e30)  # of values and their spread: beyond, products of factors leave float32

Self = TypeVar("Self", bound="SavedEstimator")


class SavedEstimator:
    """``save`` and ``load`` of a fitted estimator: an ``.npz`` file of arrays and a JSON header, nothing executable."""

    _saved_arrays: tuple[str, ...] = ()
    _saved_values: tuple[str, ...] = ()  # what JSON can hold
    status_: solver.Status
    get_params: Callable[[], dict[str, Any]]  # of scikit-learn's BaseEstimator

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the fitted estimator to an ``.npz`` file, atomically; it holds arrays and JSON only, nothing executable.

        ``progress`` is not kept, nor a ``random_state`` that is not an int.
        """
        check_is_fitted(self)
        parameters = {k: v for k, v in self.get_params().items() if k not in ("progress", "random_state")}
        random_state = getattr(self, "random_state", None)
        if isinstance(random_state, (int, np.integer)):
            parameters["random_state"] = random_state
        header = {
            "format": f"lowrank_kernels.{type(self).__name__}/1",
            "parameters": parameters,
            "status": self.status_.name,
            **{name.rstrip("_"): getattr(self, name) for name in (*self._saved_values, "n_steps_", "history_")},
        }
        arrays = {"header": np.array(json.dumps(header, default=_as_json)), **self._arrays()}
        write_arrays(path, arrays, overwrite=overwrite)

    @classmethod
    def load(cls: type[Self], path: str | PathLike[str]) -> Self:
        """Read an estimator written by :meth:`save`; nothing from the file is executed."""
        try:
            with np.load(Path(path), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop("header")))
            wanted = f"lowrank_kernels.{cls.__name__}/1"
            if header.get("format") != wanted:
                raise ValueError(f"its format is {header.get('format')!r}, wanted {wanted!r}")
            parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in header["parameters"].items()}
            model = cls(**parameters)
            model.status_ = solver.Status[header["status"]]
            for name in (*cls._saved_values, "n_steps_", "history_"):
                setattr(model, name, header[name.rstrip("_")])
            model._take_arrays(arrays)
        except OSError:  # not there, not readable: the system's words
            raise
        except Exception as error:
            words = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            raise ValueError(f"{cls.__name__}.load: {path} is not a whole model saved by this class: {words}") from error
        return model

    def _arrays(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._saved_arrays}

    def _take_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Set the attributes of ``_arrays`` and refuse what does not fit together."""
        for name in self._saved_arrays:
            setattr(self, name, arrays[name])

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A refused or failed fit leaves the estimator as it was, fitted or not."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise


class DeepMatrixCompletion(SavedEstimator, RegressorMixin, BaseEstimator):
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
        values, weights = _values("fit", y, sample_weight, len(row))
        with self._all_or_nothing():
            keep = self.warm_start and hasattr(self, "left_") and self._same_labels(row_labels, col_labels)
            self.row_labels_, self.col_labels_ = row_labels, col_labels
            self._keep_entries(row_codes, col_codes, values, weights)
            self._train(warm=keep, max_steps=self.max_steps)
        return self

    def partial_fit(self, pairs: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> DeepMatrixCompletion:
        """Add entries, and with them new rows and columns; only the new ones need to be given.

        An entry that was known is replaced. Training continues from the current factors for a third of ``max_steps``; it
        starts anew where ``rank="auto"`` has grown with the matrix.
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
            given = _plain(_refuse_empty("partial_fit", name, given))
            _same_kind(name, known, given)
            merged, positions = np.unique(np.concatenate([known, given]), return_inverse=True)
            labels.append(merged)
            codes.append(np.concatenate([positions[: len(known)][old_codes], positions[len(known) :]]))
        both_weights = None
        if old["weight"] is not None or weights is not None:
            both_weights = np.concatenate([_or_ones(old["weight"], len(old["value"])), _or_ones(weights, len(values))])
        with self._all_or_nothing():
            outgrown = self.rank == "auto" and self._rank((len(labels[0]), len(labels[1]))) > self.left_.shape[1]
            anew = outgrown or not (self._effective_left().any() and self.right_.any())  # zero factors would stay zero
            rows, cols = np.searchsorted(labels[0], self.row_labels_), np.searchsorted(labels[1], self.col_labels_)
            self._spread_factors(rows, cols, labels)
            self.row_labels_, self.col_labels_ = labels
            self._keep_entries(codes[0], codes[1], np.concatenate([old["value"], values]), both_weights, duplicates="last")
            if not anew:
                self._fold_in(np.setdiff1d(np.arange(len(labels[1])), cols))
            self._train(warm=not anew, max_steps=self.max_steps if anew else max(1, self.max_steps // 3))
        return self

    def _keep_entries(
        self,
        row: NDArray[Any],
        col: NDArray[Any],
        values: NDArray[np.float64],
        weights: NDArray[np.float64] | None,
        duplicates: str = "mean",
    ) -> None:
        """Store the training entries, one a pair."""
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

    def _train(self, *, warm: bool, max_steps: int) -> None:
        known, dtype = self.entries_, getattr(torch, self.dtype)
        shape = (len(self.row_labels_), len(self.col_labels_))
        if known["weight"] is not None and not known["weight"].all():  # a weight of 0 is an entry that is not there
            known = {name: array[self.entries_["weight"] > 0] for name, array in known.items()}
        weight = known["weight"]
        offset, scale = mean_and_scale(known["value"], weight)
        low, high = FLOAT32_RANGE
        if self.dtype == "float32" and not low < scale < high:
            raise ValueError(
                f"DeepMatrixCompletion: y must have a spread between {low:g} and {high:g} in float32, got {scale:g}; "
                "rescale y or use dtype='float64'"
            )
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
        automatic = isinstance(self.regularization, str)
        stopping = not automatic if isinstance(self.early_stopping, str) else self.early_stopping
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
        pair = None if automatic else (float(self.regularization[0]), float(self.regularization[1]))
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

    def _fold_in(self, new: NDArray[Any]) -> None:
        """Start new columns by ridge regression on the rows' factors: gradient steps from zero would take too long.

        Rows need no such start: a small change of ``left`` is a large one of ``left C``.
        """
        k = len(self.right_)
        old = np.setdiff1d(np.arange(self.right_.shape[1]), new)
        right = self.right_[:, old].astype(np.float64)
        random = check_random_state(self.random_state)
        # Not zero: a new row that meets new columns only would never leave it.
        self.right_[:, new] = random.normal(0, 0.1 * right.std(), (k, len(new)))
        noise = max(self.history_[-1]["train_rmse"] if self.history_ else 0.0, 1e-6 * float(np.abs(right).max()), 1e-300) ** 2
        prior = np.append(np.square(right).mean(1), np.square(self.col_bias_[old].astype(np.float64)).mean() or 1e-300)
        ridge = np.diag(noise / np.maximum(prior, 1e-12 * prior.max()))
        features = np.column_stack([self._effective_left().astype(np.float64), np.full(len(self.left_), float(self.fit_bias))])
        entries, weight = self.entries_, self.entries_["weight"]
        weight = None if weight is None else weight / weight.mean()
        order = np.argsort(entries["col"], kind="stable")
        bounds = np.searchsorted(entries["col"], np.stack([new, new + 1]), sorter=order)
        for column, begin, end in zip(new, *bounds, strict=True):
            at = order[begin:end]
            x, known = features[entries["row"][at]], entries["value"][at] - self.offset_ - self.row_bias_[entries["row"][at]]
            weighted = x if weight is None else x * weight[at, None]
            solution = np.linalg.lstsq(x.T @ weighted + ridge, weighted.T @ known, rcond=None)[0]
            if x[:, :k].any():
                self.right_[:, column] = solution[:k]
            self.col_bias_[column] = solution[k]

    # ------------------------------------------------------------------ prediction

    def predict(self, pairs: Any) -> NDArray[Any]:
        """``(P,)`` float64 predictions; where a row or column was not seen in ``fit``, the other side's bias and the mean."""
        check_is_fitted(self)
        row, col = _two_columns("predict", pairs)
        i, j = _codes("row", self.row_labels_, row), _codes("column", self.col_labels_, col)
        effective = self._effective_left()
        out = np.full(len(i), self.offset_)  # float64: an offset far above the spread would swallow it in float32
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
        if not is_integer(n) or n < 1:
            raise ValueError(f"DeepMatrixCompletion.recommend: n must be an integer of at least 1, got {n!r}")
        if np.ndim(row) != 0:
            raise ValueError(f"DeepMatrixCompletion.recommend: row must be one label, got an array of shape {np.shape(row)}")
        i = int(_codes("row", self.row_labels_, _labels([row]))[0])
        scores = self.offset_ + self.col_bias_.astype(np.float64)
        if i >= 0:
            scores = scores + self.row_bias_[i] + self._effective_left(slice(i, i + 1))[0] @ self.right_
            if exclude_seen:
                scores[self.entries_["col"][self.entries_["row"] == i]] = -np.inf
        best = np.argsort(-scores, kind="stable")[:n]
        best = best[np.isfinite(scores[best])]
        return self.col_labels_[best], scores[best]

    def _effective_left(self, rows: slice = slice(None)) -> NDArray[Any]:
        left = self.left_[rows]
        for layer in self.core_[::-1]:
            left = left @ layer
        return left

    # ------------------------------------------------------------------ files

    _saved_arrays = ("left_", "core_", "right_", "row_bias_", "col_bias_", "row_labels_", "col_labels_")
    _saved_values = ("offset_",)

    def _arrays(self) -> dict[str, Any]:
        for name, labels in (("row", self.row_labels_), ("column", self.col_labels_)):
            if labels.dtype.kind not in "biufUS":
                raise TypeError(
                    f"DeepMatrixCompletion.save: {name} labels must be numbers or strings to be saved, got {labels.dtype}; "
                    "convert them before fit"
                )
        return super()._arrays() | {f"entries_{k}": v for k, v in self.entries_.items() if v is not None}

    def _take_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        super()._take_arrays(arrays)
        entries = {k: arrays[f"entries_{k}"] for k in ("row", "col", "value")}
        self.entries_ = {**entries, "weight": arrays.get("entries_weight")}
        self.n_features_in_ = 2
        m, n, k = len(self.row_labels_), len(self.col_labels_), self.left_.shape[1]
        factors = {"left_": (m, k), "core_": (len(self.core_), k, k), "right_": (k, n)}
        self._check_shapes({**factors, "row_bias_": (m,), "col_bias_": (n,), "row_labels_": (m,), "col_labels_": (n,)})
        for name, array in self.entries_.items():
            if array is not None and array.shape != entries["value"].shape:
                raise ValueError(f"entries_{name} must have shape {entries['value'].shape}, got {array.shape}")
        for name, count in (("row", m), ("col", n)):
            if entries[name].dtype.kind != "i" or not (entries[name].min() >= 0 and entries[name].max() < count):
                raise ValueError(f"entries_{name} must be integers in [0, {count})")

    # ------------------------------------------------------------------ checks

    def _rank(self, shape: tuple[int, int]) -> int:
        largest = min(shape) // 2 * 2
        if self.rank == "auto":
            return min(32, largest)
        if self.rank > largest:  # type: ignore[operator]
            raise ValueError(
                f"DeepMatrixCompletion: rank must be 'auto' or at most {largest} for {shape[0]} rows and {shape[1]} columns, "
                f"got {self.rank}"
            )
        return int(self.rank)

    def _check_parameters(self) -> None:
        def refuse(name: str, wanted: str) -> None:
            raise ValueError(f"DeepMatrixCompletion: {name} must be {wanted}, got {getattr(self, name)!r}")

        rank = self.rank
        if not (isinstance(rank, str) and rank == "auto") and not (is_integer(rank) and rank >= 2 and rank % 2 == 0):  # type: ignore[operator]
            refuse("rank", "'auto' or an even integer of at least 2 (half of it are directions of the gradient)")
        check_common(self)
        if isinstance(self.regularization, str) or np.shape(self.regularization) != (2,):
            if not isinstance(self.regularization, str) or self.regularization != "auto":
                refuse("regularization", "'auto' or a pair (constant, per_observation) of non-negative numbers")
        elif not all(is_number(x) and 0 <= x < np.inf for x in self.regularization):
            refuse("regularization", "'auto' or a pair (constant, per_observation) of non-negative numbers")
        if not isinstance(self.early_stopping, (bool, np.bool_)) and self.early_stopping != "auto":
            refuse("early_stopping", "True, False or 'auto'")
        if not (is_number(self.validation_fraction) and 0 < self.validation_fraction < 1):
            refuse("validation_fraction", "between 0 and 1")
        if not (is_integer(self.patience) and self.patience >= 1):
            refuse("patience", "an integer of at least 1")

    def _same_labels(self, rows: NDArray[Any], cols: NDArray[Any]) -> bool:
        same = np.array_equal(rows, self.row_labels_) and np.array_equal(cols, self.col_labels_)
        fits = self.left_.shape[1] == self._rank((len(rows), len(cols))) and self.core_.shape[0] == self.depth
        return bool(same and fits)


# ---------------------------------------------------------------------- helpers


def is_integer(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def _as_json(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)  # numpy's numbers; a torch.device


def check_common(estimator: Any) -> None:
    """The parameters that both estimators have."""

    def refuse(name: str, wanted: str) -> None:
        raise ValueError(f"{type(estimator).__name__}: {name} must be {wanted}, got {getattr(estimator, name)!r}")

    for name in ("depth", "max_steps"):
        value = getattr(estimator, name)
        if not (is_integer(value) and value >= 1):
            refuse(name, "an integer of at least 1")
    if not (is_number(estimator.learning_rate) and 0 < estimator.learning_rate < np.inf):
        refuse("learning_rate", "positive and finite")
    if estimator.dtype not in ("float32", "float64"):
        refuse("dtype", "'float32' or 'float64'")
    if not (estimator.progress is None or isinstance(estimator.progress, bool) or callable(estimator.progress)):
        refuse("progress", "True, False or a callable")
    try:
        torch.empty(0, device=estimator.device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises all three
        raise ValueError(
            f"{type(estimator).__name__}: device must be None or a torch device of this machine, got {estimator.device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def mean_and_scale(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> tuple[float, float]:
    """Mean and standard deviation, the mean's size (or 1) for constant values. Squares neither overflow nor underflow."""
    largest = float(np.abs(values).max()) or 1.0
    scaled = values / largest
    mean = float(np.average(scaled, weights=weights))
    spread = float(np.abs(scaled - mean).max())
    if spread <= 1e-12:  # constant up to rounding
        return mean * largest, abs(mean * largest) or 1.0
    root = float(np.sqrt(np.average(((scaled - mean) / spread) ** 2, weights=weights)))
    return mean * largest, root * spread * largest


def _two_columns(method: str, pairs: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    wanted = "an (entries, 2) array of row and column labels or a tuple of two label arrays"
    if isinstance(pairs, tuple) and len(pairs) == 2:
        row, col = _labels(pairs[0]), _labels(pairs[1])
    elif hasattr(pairs, "iloc") or hasattr(pairs, "get_columns"):  # pandas, polars: each column keeps its own type
        if pairs.shape[1] != 2:
            raise ValueError(f"DeepMatrixCompletion.{method}: pairs must have 2 columns (row, column), got {pairs.shape[1]}")
        columns = [pairs.iloc[:, 0], pairs.iloc[:, 1]] if hasattr(pairs, "iloc") else pairs.get_columns()
        row, col = (column.to_numpy() for column in columns)
    else:
        array = _labels(pairs)
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f"DeepMatrixCompletion.{method}: pairs must be {wanted}, got shape {array.shape}")
        row, col = array[:, 0], array[:, 1]
    if row.ndim != 1 or row.shape != col.shape:
        raise ValueError(
            f"DeepMatrixCompletion.{method}: row and column labels must be 1-D and of one length, "
            f"got {row.shape} and {col.shape}; pairs is {wanted}"
        )
    return row, col


def _labels(given: Any) -> NDArray[Any]:
    """An array; one of mixed Python objects keeps them, where numpy would turn numbers beside strings into strings."""
    if isinstance(given, torch.Tensor):
        return given.detach().cpu().numpy()
    try:
        array = np.asarray(given)
    except ValueError as error:  # ragged
        raise ValueError(f"DeepMatrixCompletion: pairs must be an (entries, 2) array or a tuple of two: {error}") from error
    return np.asarray(given, dtype=object) if array.dtype.kind in "US" and not hasattr(given, "dtype") else array


def _refuse_empty(method: str, side: str, labels: NDArray[Any]) -> NDArray[Any]:
    if len(labels) == 0:
        raise ValueError(f"DeepMatrixCompletion.{method}: pairs is empty; at least one observed entry is needed")
    plain = _plain(labels)
    if plain.dtype.kind == "f":
        bad = ~np.isfinite(plain)
    elif plain.dtype.kind == "O":
        bad = np.array([x is None or x != x for x in plain])
    else:
        return labels
    if bad.any():
        raise ValueError(
            f"DeepMatrixCompletion.{method}: {side} labels must not be missing, NaN or infinite, "
            f"got {plain[bad.argmax()]} at position {int(bad.argmax())} ({int(bad.sum())} such positions)"
        )
    return labels


def _unique(side: str, labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = _plain(_refuse_empty("fit", side, labels))
    try:
        unique, codes = np.unique(labels, return_inverse=True)
    except TypeError as error:
        kinds = sorted({type(x).__name__ for x in labels})
        raise TypeError(
            f"DeepMatrixCompletion.fit: {side} labels must all be of one kind, numbers or strings, got {' and '.join(kinds)}; "
            "convert them, for example with str()"
        ) from error
    return unique, codes


def _plain(labels: NDArray[Any]) -> NDArray[Any]:
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


def _same_kind(side: str, known: NDArray[Any], given: NDArray[Any]) -> None:
    kinds = {"b": "number", "i": "number", "u": "number", "f": "number", "U": "string", "S": "bytes"}
    known_kind, given_kind = kinds.get(known.dtype.kind, "object"), kinds.get(_plain(given).dtype.kind, "object")
    if len(given) and known_kind != given_kind:
        raise TypeError(
            f"DeepMatrixCompletion: {side} labels must be {_PLURALS[known_kind]} as in fit, got {_PLURALS[given_kind]}; "
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

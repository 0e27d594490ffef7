"""Matrix completion in scikit-learn's conventions: :class:`DeepMatrixCompletion` for (row, column, value) data.

The model is ``left @ core[L-1] ... core[0] @ right + b_i + c_j + mu``, started by the paper's compression and trained by
:func:`lowrank_kernels.solver.train`. Needs scikit-learn (the extra ``[estimators]``).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from . import solver
from .checkpoints import Checkpoints, fingerprint
from .entries import ObservedEntries
from .estimators import SavedEstimator, check_common, in_units, is_integer, is_number, mean_and_scale, progress_callback
from .files import check_output
from .labels import (
    as_labels,
    checked_values,
    frame_names,
    label_codes,
    or_ones,
    plain,
    refuse_missing,
    refuse_other_kind,
    refuse_other_names,
    team_labels,
    two_columns,
    unique_labels,
)
from .parts import read_parts
from .processes import Team, agreed, team_of
from .row_shards import RowShard

logger = logging.getLogger("lowrank_kernels")

PREDICT_BLOCK = 1 << 16  # pairs gathered at a time: 2 x 65536 x rank numbers
IDENTITY = (  # settings that a checkpoint must have been made with
    "depth",
    "learning_rate",
    "regularization",
    "noise_weights",
    "fit_bias",
    "early_stopping",
    "validation_fraction",
    "patience",
    "dtype",
)
FLOAT32_RANGE = (1e-30, 1e30)  # of values and their spread: beyond, products of factors leave float32


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
        distributed: the rows are shared out over the processes of the default group of ``torch.distributed``: every process
            gives the entries of its own rows to ``fit`` (some may have none), or the same files to :meth:`fit_parts`. Then
            ``left_``, ``row_bias_`` and ``row_labels_`` are those of its rows, and ``predict``, ``recommend`` and ``save``
            are called by all processes together.
        checkpoint: folder that keeps the state of the training, the same for all processes; a fit that finds one there, of
            the same data and settings, goes on from it, on any number of processes.
        checkpoint_every: steps between checkpoints, a multiple of 10.
        progress: True for a progress bar (needs rich), or a callable ``progress(step, max_steps, record)``.

    Attributes:
        left_, core_, right_: ``(m, k)``, ``(L, k, k)`` and ``(k, n)`` arrays, in the units of y.
        row_bias_, col_bias_, offset_: biases and mean.
        row_labels_, col_labels_: sorted labels of the rows and columns.
        feature_names_in_: names of the two columns, where ``fit`` was given a data frame.
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
        distributed: bool = False,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int = 50,
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
        self.distributed = distributed
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.progress = progress

    entries_: Any  # the arrays row, col, value, weight; None where they are not kept

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
        team = self._fitting_team("fit")
        with self._all_or_nothing():
            with team.together():
                row, col = two_columns("fit", pairs)
                if team.size > 1 and len(row) == 0:
                    row_labels, row_codes, col_labels, col_codes = row, np.zeros(0, np.int64), col, np.zeros(0, np.int64)
                else:
                    row_labels, row_codes = unique_labels("row", row)
                    col_labels, col_codes = unique_labels("column", col)
                values, weights = checked_values("fit", y, sample_weight, len(row))
                if team.size > 1:
                    own, col_labels = col_labels, team_labels(team, row_labels, col_labels)
                    col_codes = np.searchsorted(col_labels, own)[col_codes]
                    if any(team.meet(weights is not None)):
                        weights = or_ones(weights, len(values))
                keep = self.warm_start and hasattr(self, "left_") and self._same_labels(row_labels, col_labels, team)
                keep = all(team.meet(keep))
                self.row_labels_, self.col_labels_ = row_labels, col_labels
                self._take_names(frame_names(pairs))
                self._keep_entries(row_codes, col_codes, values, weights)
                entries, offset, scale = self._standardized(team)
                shard = RowShard.of(team, len(row_labels))
            self._solve(entries, offset, scale, shard, warm=keep, max_steps=self.max_steps)
        return self

    def fit_parts(
        self,
        parts: PathLike[str] | str | Iterable[PathLike[str] | str],
        *,
        row: str | None = None,
        col: str | None = None,
        value: str | None = None,
        duplicates: str = "error",
        memory_limit: int | None = None,
        report: Callable[[str, int, int], None] | None = None,
    ) -> DeepMatrixCompletion:
        """Fit on the entries of Parquet or CSV parts, read in streams: :func:`lowrank_kernels.parts.read_parts`.

        With ``distributed=True`` all processes name the same files, and each reads the entries of its own rows. The entries
        are not kept. The memory that is needed is logged before the work starts (logger ``lowrank_kernels``), and refused with
        the numbers where there is less.

        Args:
            parts: files, a folder or a pattern.
            row, col, value: column names; by default guessed from names such as userId, movieId, rating.
            duplicates: what a pair given twice means: ``"error"`` or ``"mean"``.
            memory_limit: bytes allowed on a machine; by default what is free.
            report: called as ``report(what, done, total)`` while the files are read.
        """
        team = self._fitting_team("fit_parts")
        with self._all_or_nothing():
            with team.together():
                found = read_parts(
                    parts,
                    row=row,
                    col=col,
                    value=value,
                    duplicates=duplicates,
                    dtype=getattr(torch, self.dtype),
                    rank=32 if isinstance(self.rank, str) else self.rank,
                    automatic=isinstance(self.regularization, str),
                    memory_limit=memory_limit,
                    team=team,
                    report=report,
                    say=logger.info if team.rank == 0 else None,
                )
                labels = found.row_labels, found.col_labels
                keep = self.warm_start and hasattr(self, "left_") and self._same_labels(*labels, team)
                keep = all(team.meet(keep))
                self.row_labels_, self.col_labels_ = labels
                self._take_names(None)
                self.entries_ = None
                entries = found.entries.to(self.device)
            self._solve(entries, found.offset, found.scale, found.shard, warm=keep, max_steps=self.max_steps)
        return self

    def partial_fit(self, pairs: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> DeepMatrixCompletion:
        """Add entries, and with them new rows and columns; only the new ones need to be given.

        An entry that was known is replaced. Training continues from the current factors for a third of ``max_steps``; it
        starts anew where ``rank="auto"`` has grown with the matrix.
        """
        if not hasattr(self, "left_"):
            return self.fit(pairs, y, sample_weight)
        self._check_parameters()
        if self.distributed:
            raise ValueError("DeepMatrixCompletion.partial_fit: works in one process; fit() all entries with warm_start=True")
        self._refuse_without_entries("partial_fit", "fit() the old and the new entries together")
        refuse_other_names("partial_fit", getattr(self, "feature_names_in_", None), pairs)
        row, col = two_columns("partial_fit", pairs)
        values, weights = checked_values("partial_fit", y, sample_weight, len(row))
        old = self.entries_
        labels, codes = [], []
        for name, known, old_codes, given in (
            ("row", self.row_labels_, old["row"], row),
            ("column", self.col_labels_, old["col"], col),
        ):
            given = plain(refuse_missing("partial_fit", name, given))
            refuse_other_kind(name, known, given)
            merged, positions = np.unique(np.concatenate([known, given]), return_inverse=True)
            labels.append(merged)
            codes.append(np.concatenate([positions[: len(known)][old_codes], positions[len(known) :]]))
        both_weights = None
        if old["weight"] is not None or weights is not None:
            both_weights = np.concatenate([or_ones(old["weight"], len(old["value"])), or_ones(weights, len(values))])
        with self._all_or_nothing():
            outgrown = self.rank == "auto" and self._rank((len(labels[0]), len(labels[1]))) > self.left_.shape[1]
            anew = outgrown or not (self._effective_left().any() and self.right_.any())  # zero factors would stay zero
            rows, cols = np.searchsorted(labels[0], self.row_labels_), np.searchsorted(labels[1], self.col_labels_)
            self._spread_factors(rows, cols, labels)
            self.row_labels_, self.col_labels_ = labels
            self._keep_entries(codes[0], codes[1], np.concatenate([old["value"], values]), both_weights, duplicates="last")
            if not anew:
                self._fold_in(np.setdiff1d(np.arange(len(labels[1])), cols))
            entries, offset, scale = self._standardized(Team())
            shard = RowShard.of(Team(), len(labels[0]))
            steps = self.max_steps if anew else max(1, self.max_steps // 3)
            self._solve(entries, offset, scale, shard, warm=not anew, max_steps=steps)
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
        if not len(values):  # a process without entries
            none = None if weights is None else np.zeros(0)
            self.entries_ = {"row": np.zeros(0, np.int32), "col": np.zeros(0, np.int32), "value": np.zeros(0), "weight": none}
            return
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
        self.entries_ = {
            "row": sorted_row.numpy().astype(np.int32 if entries.shape[0] < 2**31 else np.int64),
            "col": sorted_col.numpy().astype(np.int32 if entries.shape[1] < 2**31 else np.int64),
            "value": sorted_values.numpy(),
            "weight": None if sorted_weights is None else sorted_weights.numpy(),
        }

    def _standardized(self, team: Team) -> tuple[ObservedEntries, float, float]:
        """The entries that are kept, with zero mean and unit variance over all processes; their mean and scale."""
        known, dtype = self.entries_, getattr(torch, self.dtype)
        shape = (len(self.row_labels_), len(self.col_labels_))
        if known["weight"] is not None and not known["weight"].all():  # a weight of 0 is an entry that is not there
            known = {name: array[self.entries_["weight"] > 0] for name, array in known.items()}
        weight = known["weight"]
        offset, scale = mean_and_scale(known["value"], weight, team)
        if weight is not None:
            count, total = np.sum(team.meet((len(weight), float(weight.sum()))), axis=0)
            weight = weight * (count / total)
        if len(known["value"]):
            standard = (known["value"] - offset) / scale
            entries = ObservedEntries.from_coo(
                known["row"], known["col"], standard, shape=shape, weights=weight, dtype=dtype, device=self.device
            )
        else:
            entries = ObservedEntries.none(shape, weighted=weight is not None, dtype=dtype, device=self.device)
        return entries, offset, scale

    def _solve(
        self, entries: ObservedEntries, offset: float, scale: float, shard: RowShard, *, warm: bool, max_steps: int
    ) -> None:
        """Fit the standardized entries of the rows that are here."""
        low, high = FLOAT32_RANGE
        if self.dtype == "float32" and not low < scale < high:
            raise ValueError(
                f"DeepMatrixCompletion: y must have a spread between {low:g} and {high:g} in float32, got {scale:g}; "
                "rescale y or use dtype='float64'"
            )
        team, n = shard.team, entries.shape[1]
        random_state = 0 if self.checkpoint is not None and self.random_state is None else self.random_state
        seed = team.meet(int(check_random_state(random_state).randint(2**31)))[0]
        generator = torch.Generator().manual_seed(seed)
        validation = None
        automatic = isinstance(self.regularization, str)
        stopping = not automatic if isinstance(self.early_stopping, str) else self.early_stopping
        checkpoint = None
        if self.checkpoint is not None:
            identity = fingerprint(entries, shard) | {"mean": f"{offset:.6g}", "scale": f"{scale:.6g}"}
            identity |= {"rank": self._rank((shard.total, n)), "max_steps": max_steps, "warm": warm}
            identity |= {name: getattr(self, name) for name in IDENTITY} | ({"seed": seed} if stopping else {})
            checkpoint = Checkpoints(self.checkpoint, shard, identity, every=self.checkpoint_every)
        if stopping:
            counts = team.meet(len(entries))
            draw = shard.uniform(sum(counts[: team.rank]), len(entries), sum(counts), generator)
            held = draw.to(entries.device) < self.validation_fraction
            if 0 < sum(team.meet(int(held.sum()))) < sum(counts):
                entries, validation = entries._kept(~held), entries._kept(held)
        if warm:
            model = self._current_model(offset, scale, entries)
        else:
            rank = self._rank((shard.total, n))
            bias = self.fit_bias
            model = solver.start(
                entries, rank, depth=self.depth, row_bias=bias, col_bias=bias, generator=generator, shard=shard
            )
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
        with progress_callback(self.progress if team.rank == 0 else False, max_steps, scale) as callback:
            result = solver.train(
                model, entries, options, validation=validation, callback=callback, shard=shard, checkpoint=checkpoint
            )
        self.left_ = model.left.cpu().numpy()
        self.core_ = model.core.cpu().numpy()
        self.right_ = (scale * model.columns).cpu().numpy().T
        self.row_bias_ = (scale * model.row_bias).cpu().numpy()
        self.col_bias_ = (scale * model.col_bias).cpu().numpy()
        self.offset_ = offset
        self.status_ = result.status
        self.history_ = [in_units(record, scale) for record in result.history]
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
            tensor(self.row_bias_) / scale if self.fit_bias else torch.zeros_like(tensor(self.row_bias_)),
            (tensor(self.col_bias_) + shift) / scale if self.fit_bias else torch.zeros_like(tensor(self.col_bias_)),
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
        team = self._team("predict")
        with team.together():
            refuse_other_names("predict", getattr(self, "feature_names_in_", None), pairs)
            row, col = two_columns("predict", pairs)
            wanted = team.meet((row, col))
            parts = team.meet([self._row_part(*each) for each in wanted])  # a pair's row is here or elsewhere
            j = label_codes("column", self.col_labels_, col)
            out = np.full(len(j), self.offset_)  # float64: an offset far above the spread would swallow it in float32
            out += np.where(j >= 0, self.col_bias_[j], 0)
            out += sum(each[team.rank] for each in parts)
        return out

    def _row_part(self, row: NDArray[Any], col: NDArray[Any]) -> NDArray[np.float64]:
        """What the rows that are here say of each pair: their bias and product; 0 for other rows."""
        out = np.zeros(len(row))
        if not len(self.row_labels_):
            return out
        i, j = label_codes("row", self.row_labels_, row), label_codes("column", self.col_labels_, col)
        out += np.where(i >= 0, self.row_bias_[i], 0)
        effective, columns = self._effective_left(), np.ascontiguousarray(self.right_.T)
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
        if exclude_seen:
            self._refuse_without_entries("recommend", "pass exclude_seen=False")
        team = self._team("recommend")
        scores = self.offset_ + self.col_bias_.astype(np.float64)
        with team.together():
            asked = team.meet((row, exclude_seen))
            parts = team.meet([self._row_scores(*each) for each in asked])
            scores = scores + sum(each[team.rank] for each in parts)
        best = np.argsort(-scores, kind="stable")[:n]
        best = best[np.isfinite(scores[best])]
        return self.col_labels_[best], scores[best]

    def _row_scores(self, row: Any, exclude_seen: bool) -> NDArray[np.float64] | float:
        """What a row adds to the score of every column, -inf where it was seen; 0 where the row is not here."""
        i = int(label_codes("row", self.row_labels_, as_labels([row]))[0]) if len(self.row_labels_) else -1
        if i < 0:
            return 0.0
        scores = np.asarray(self.row_bias_[i] + self._effective_left(slice(i, i + 1))[0] @ self.right_, np.float64)
        if exclude_seen:
            scores[self.entries_["col"][self.entries_["row"] == i]] = -np.inf
        return scores

    def _effective_left(self, rows: slice = slice(None)) -> NDArray[Any]:
        left = self.left_[rows]
        for layer in self.core_[::-1]:
            left = left @ layer
        return left

    # ------------------------------------------------------------------ files

    _saved_arrays = ("left_", "core_", "right_", "row_bias_", "col_bias_", "row_labels_", "col_labels_")
    _saved_values = ("offset_",)

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the fitted estimator to an ``.npz`` file, atomically; it holds arrays and JSON only, nothing executable.

        ``progress`` is not kept, nor a ``random_state`` that is not an int. Where the rows are shared out, all processes
        call this, the first one collects the rows and writes one file that one process loads; the entries are left out.
        """
        check_is_fitted(self)
        team = self._team("save")
        if team.size == 1:
            super().save(path, overwrite)
            return
        with team.together():
            if team.rank == 0:
                check_output(path, overwrite, (".npz",))
            pieces = team.to_first((self.row_labels_, self.left_, self.row_bias_))
            if pieces is not None:
                pieces = [piece for piece in pieces if len(piece[0])]
                labels, left, bias = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
                order = np.argsort(labels, kind="stable")
                whole = copy.copy(self).set_params(distributed=False, checkpoint=None)
                whole.row_labels_, whole.left_, whole.row_bias_ = labels[order], left[order], bias[order]
                whole.entries_ = None
                whole.save(path, overwrite)
            team.meet(None)

    def _arrays(self) -> dict[str, Any]:
        for name, labels in (("row", self.row_labels_), ("column", self.col_labels_)):
            if labels.dtype.kind not in "biufUS":
                raise TypeError(
                    f"DeepMatrixCompletion.save: {name} labels must be numbers or strings to be saved, got {labels.dtype}; "
                    "convert them before fit"
                )
        return super()._arrays() | {f"entries_{k}": v for k, v in (self.entries_ or {}).items() if v is not None}

    def _take_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        super()._take_arrays(arrays)
        self.n_features_in_ = 2
        m, n, k = len(self.row_labels_), len(self.col_labels_), self.left_.shape[1]
        factors = {"left_": (m, k), "core_": (len(self.core_), k, k), "right_": (k, n)}
        self._check_shapes({**factors, "row_bias_": (m,), "col_bias_": (n,), "row_labels_": (m,), "col_labels_": (n,)})
        self.entries_ = None
        if not any(name.startswith("entries_") for name in arrays):
            return
        entries = {k: arrays[f"entries_{k}"] for k in ("row", "col", "value")}
        self.entries_ = {**entries, "weight": arrays.get("entries_weight")}
        for name, array in self.entries_.items():
            if array is not None and array.shape != entries["value"].shape:
                raise ValueError(f"entries_{name} must have shape {entries['value'].shape}, got {array.shape}")
        for name, count in (("row", m), ("col", n)):
            if entries[name].dtype.kind != "i" or not (entries[name].min() >= 0 and entries[name].max() < count):
                raise ValueError(f"entries_{name} must be integers in [0, {count})")

    # ------------------------------------------------------------------ checks

    def _team(self, method: str) -> Team:
        """The processes that hold the rows."""
        if not self.distributed:
            return Team()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                f"DeepMatrixCompletion.{method}: distributed=True needs a process group; start with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        return team_of(f"DeepMatrixCompletion.{method}")

    def _fitting_team(self, method: str) -> Team:
        """The same, once the parameters were found right, and the same, in all of them."""
        if not isinstance(self.distributed, (bool, np.bool_)):
            raise ValueError(f"DeepMatrixCompletion: distributed must be True or False, got {self.distributed!r}")
        team = self._team(method)
        with team.together():
            self._check_parameters()
            names = ("rank", *IDENTITY, "max_steps", "warm_start", "checkpoint", "checkpoint_every")
            agreed(team, f"DeepMatrixCompletion.{method}", {name: getattr(self, name) for name in names})
        return team

    def _refuse_without_entries(self, method: str, step: str) -> None:
        if self.entries_ is None:
            raise ValueError(
                f"DeepMatrixCompletion.{method}: needs the entries, which fit_parts() does not keep, nor save() of several "
                f"processes; {step}"
            )

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
        if not (is_integer(self.checkpoint_every) and self.checkpoint_every >= 10 and self.checkpoint_every % 10 == 0):
            refuse("checkpoint_every", "a multiple of 10, the steps between checks")

    def _same_labels(self, rows: NDArray[Any], cols: NDArray[Any], team: Team) -> bool:
        same = np.array_equal(rows, self.row_labels_) and np.array_equal(cols, self.col_labels_)
        rank = self._rank((sum(team.meet(len(rows))), len(cols)))
        fits = self.left_.shape[1] == rank and self.core_.shape[0] == self.depth
        return bool(same and fits)

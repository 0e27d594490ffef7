"""Imputation of tables with missing cells, in scikit-learn's conventions: :class:`LowRankImputer`.

A table of measurements is rarely low-rank itself: columns depend on each other nonlinearly. Its products of columns make
it so: the table is standardised, all products ``z_i z_j`` are appended as columns (observed where both factors are), and
the deep low-rank model is fitted to this lifted table (Ongie et al., 2017, call it a variety). With ``window`` the rows are
taken as a time series and each is joined with its neighbours instead (a block-Hankel matrix).

A row, old or new, is completed by its posterior mean under the fitted columns: with W the effective columns, psi_j the mean
squared residual of column j and (u_0, S) mean and covariance of the training rows' factors,

    u = u_0 + (S^-1 + sum_j W_j W_j^T / (lambda psi_j))^-1 sum_j W_j (z_j - b_j - W_j^T u_0) / (lambda psi_j)

over the row's observed columns j; lambda is chosen on held-out cells. Needs scikit-learn.
"""

from __future__ import annotations

import math
import warnings
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from . import solver
from .entries import ObservedEntries
from .estimators import SavedEstimator, check_common, is_integer, is_number, mean_and_scale, progress_callback
from .files import as_held

try:
    from sklearn.utils.validation import validate_data  # 1.6
except ImportError:  # a method of every estimator before
    validate_data = None

Array = NDArray[np.float64]

MAX_LIFTED = 30  # base columns up to which degree="auto" appends products: n (n + 3) / 2 columns in all
MIN_PRODUCTS = 50  # a product column seen in fewer rows is left out
CLIP = 0.002  # products are clipped at these quantiles: a few extreme ones would dominate their column
RIDGES = (0.5, 1.0, 2.0, 4.0)  # lambda of the row posterior, chosen on held-out cells
HELD_OUT_ROWS = 2500  # rows used to choose it
MAX_RANK = 256  # of rank="auto": work and memory grow with its square
ROW_BLOCK = 2000  # rows solved together: 2000 k x k systems, fewer where k is large
BLOCK_NUMBERS = 1 << 24  # in the products of a block, 128 MiB


class LowRankImputer(SavedEstimator, TransformerMixin, BaseEstimator):
    r"""Fill the missing cells of a table with a compressed deep low-rank model.

    Args:
        rank: inner width k; ``"auto"`` is three per input column plus one with products, else 3/4 of the columns (with a
            window: of the joined ones), at most 256.
        depth: number L of k x k cores.
        degree: 2 appends the products of all pairs of columns, 1 does not; ``"auto"`` is 2 up to 30 columns without a window.
        window: for rows in time order: join each row with its ``window`` predecessors and successors.
        missing_values: the placeholder of a missing cell, NaN by default; NaN is always missing.
        max_steps, learning_rate: of the solver (Adam with a cosine step size).
        row_penalty: L2 strength of the rows' factors.
        column_penalty: L2 strength of the columns' factors, per observation.
        validation_fraction: share of the observed cells held out to choose how strongly rows are shrunk.
        keep_empty_features: keep columns without any observed cell (filled with 0) instead of dropping them.
        device, dtype, random_state, progress: as in :class:`lowrank_kernels.DeepMatrixCompletion`.

    Attributes:
        columns_: ``(N, k)`` effective factors W of the lifted columns; ``intercept_``: ``(N,)``; ``noise_``: ``(N,)`` psi.
        ridge_: the chosen lambda; ``validation_rmse_``: error on the held-out cells, in standard deviations.
        status_, history_, n_steps_: as in :class:`lowrank_kernels.DeepMatrixCompletion`, errors in standard deviations.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Note:
        The low-rank model and the row posterior are joint Gaussian, so the gain over linear imputers comes from the
        products (or the window); the depth only shapes the training. Work grows with the square of the number of columns
        when products are appended.

    Example:
        >>> import numpy as np
        >>> from lowrank_kernels import LowRankImputer
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(500, 2)); table = np.column_stack([x, x[:, 0] + x[:, 1], x[:, 0] * x[:, 1]])
        >>> holes = table.copy(); holes[rng.random(table.shape) < 0.1] = np.nan
        >>> filled = LowRankImputer(random_state=0).fit_transform(holes)
        >>> hidden = np.isnan(holes)
        >>> bool(np.sqrt(np.mean((filled - table)[hidden] ** 2)) < 0.7 * table.std())
        True
    """

    def __init__(
        self,
        rank: int | str = "auto",
        depth: int = 3,
        *,
        degree: int | str = "auto",
        window: int = 0,
        missing_values: float = np.nan,
        max_steps: int = 300,
        learning_rate: float = 0.06,
        row_penalty: float = 0.3,
        column_penalty: float = 0.03,
        validation_fraction: float = 0.1,
        keep_empty_features: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        random_state: Any = None,
        progress: Any = False,
    ) -> None:
        self.rank = rank
        self.depth = depth
        self.degree = degree
        self.window = window
        self.missing_values = missing_values
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.row_penalty = row_penalty
        self.column_penalty = column_penalty
        self.validation_fraction = validation_fraction
        self.keep_empty_features = keep_empty_features
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.progress = progress

    # ------------------------------------------------------------------ scikit-learn's methods

    def fit(self, X: ArrayLike, y: None = None, *, mask: ArrayLike | None = None) -> LowRankImputer:
        """Fit to a ``(rows, columns)`` table; missing cells are NaN, ``missing_values``, or False in ``mask``."""
        self._check_parameters()
        with self._all_or_nothing():
            self._fit(X, mask)
        return self

    def _fit(self, X: ArrayLike, mask: ArrayLike | None) -> None:
        table = self._table("fit", X, mask, reset=True)
        seen = ~np.isnan(table)
        if not seen.any():
            raise ValueError("LowRankImputer.fit: X has no observed cell; at least one is needed")
        self.kept_ = seen.any(0)
        if not self.kept_.all() and not self.keep_empty_features:
            names = np.flatnonzero(~self.kept_).tolist()
            warnings.warn(
                f"LowRankImputer: columns {names} have no observed cell and are dropped; keep_empty_features=True keeps them",
                UserWarning,
                stacklevel=3,
            )
        table = table[:, self.kept_]
        self.mean_, self.scale_ = np.array([mean_and_scale(column[~np.isnan(column)]) for column in table.T]).T
        self._fit_standardized((table - self.mean_) / self.scale_)

    def transform(self, X: ArrayLike, *, mask: ArrayLike | None = None) -> Array:
        """The table with its missing cells filled; observed cells come back as they are. Rows need not be those of fit."""
        check_is_fitted(self)
        table = self._table("transform", X, mask, reset=False)
        kept = table[:, self.kept_]
        filled = self._complete((kept - self.mean_) / self.scale_, self.ridge_) * self.scale_ + self.mean_
        out = np.where(np.isnan(kept), filled, kept)
        if self.keep_empty_features and not self.kept_.all():
            whole = np.where(np.isnan(table), 0.0, table)
            whole[:, self.kept_] = out
            return whole
        return out

    def fit_transform(self, X: ArrayLike, y: None = None, *, mask: ArrayLike | None = None) -> Array:
        """``fit(X).transform(X)``."""
        return self.fit(X, mask=mask).transform(X, mask=mask)

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[np.object_]:
        """Names of the columns that :meth:`transform` returns."""
        check_is_fitted(self)
        names = getattr(self, "feature_names_in_", None)
        if input_features is not None:
            given = np.asarray(input_features, dtype=object)
            if given.shape != (self.n_features_in_,):
                raise ValueError(
                    f"LowRankImputer.get_feature_names_out: input_features must be {self.n_features_in_} names, "
                    f"got shape {given.shape}"
                )
            if names is not None and not np.array_equal(given, names):
                raise ValueError(
                    "LowRankImputer.get_feature_names_out: input_features must equal feature_names_in_, the names in fit"
                )
            names = given
        elif names is None:
            names = np.array([f"x{i}" for i in range(self.n_features_in_)], dtype=object)
        return names if self.keep_empty_features else names[self.kept_]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _more_tags(self) -> dict[str, Any]:  # scikit-learn below 1.6
        return {"allow_nan": True}

    # ------------------------------------------------------------------ the lifted table

    def _features(self, z: Array) -> Array:
        """``(rows, N)``: the standardised table, joined with its neighbours or with its products."""
        if self.window:
            rows, pad = len(z), np.full((self.window, z.shape[1]), np.nan)
            padded = np.concatenate([pad, z, pad])
            return np.concatenate([padded[lag : lag + rows] for lag in range(2 * self.window + 1)], axis=1)
        if not self.products_:
            return z
        lifted = np.stack([z[:, i] * z[:, j] for i, j in self.products_], axis=1)
        low, high, mean, scale = self.product_stats_
        return np.concatenate([z, (np.clip(lifted, low, high) - mean) / scale], axis=1)

    def _choose_products(self, z: Array) -> None:
        self.products_: list[tuple[int, int]] = []
        self.product_stats_ = np.zeros((4, 0))
        degree = (2 if z.shape[1] <= MAX_LIFTED and not self.window else 1) if self.degree == "auto" else self.degree
        if degree == 1:
            return
        stats = []
        for i, j in combinations_with_replacement(range(z.shape[1]), 2):
            product = z[:, i] * z[:, j]
            product = product[~np.isnan(product)]
            if len(product) < MIN_PRODUCTS:
                continue
            low, high = np.quantile(product, [CLIP, 1 - CLIP])
            product = np.clip(product, low, high)
            if product.std() > 1e-6:
                self.products_.append((i, j))
                stats.append((low, high, product.mean(), product.std()))
        if stats:
            self.product_stats_ = np.array(stats).T

    # ------------------------------------------------------------------ fitting

    def _fit_standardized(self, z: Array) -> None:
        random = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        hidden = self._hide(z, random)  # before products and lags, which would leak the cells
        shown = np.where(hidden, np.nan, z)
        self._choose_products(shown)
        table = self._features(shown)
        seen = ~np.isnan(table)
        rows = len(table)
        rank = self._rank(z.shape[1], table.shape)
        entries = ObservedEntries.from_dense(table, dtype=getattr(torch, self.dtype), device=self.device)
        model = solver.spectral_start(entries, rank, depth=self.depth, generator=generator)
        options = solver.TrainOptions(
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            core_rate=0.1,
            regularization=((self.row_penalty, 0.0), (0.0, self.column_penalty)),
            row_bias=False,
        )
        with progress_callback(self.progress, self.max_steps, 1.0) as callback:
            result = solver.train(model, entries, options, callback=callback)
        self.status_, self.history_, self.n_steps_ = result.status, result.history, result.steps
        if result.status is solver.Status.DIVERGED:
            warnings.warn(f"LowRankImputer: {result.status.message}", UserWarning, stacklevel=4)

        left = model.effective_left().double().cpu().numpy()
        self.columns_ = model.columns.double().cpu().numpy()
        bias = model.col_bias.double().cpu().numpy()
        residual = np.where(seen, table - left @ self.columns_.T - bias, 0.0)
        # Columns that a window or a product leaves unseen say nothing: an infinite psi is a weight of 0.
        counts = seen.sum(0)
        self.noise_ = np.where(counts > 0, np.square(residual).sum(0) / np.maximum(counts, 1) + 1e-4, np.inf)
        left = left[seen.any(1)]
        self.row_mean_ = left.mean(0)
        spread = np.cov(left.T, bias=True).reshape(rank, rank)
        self.row_precision_ = np.linalg.inv(spread + (1e-6 * np.trace(spread) + 1e-12) * np.eye(rank))
        constant = np.flatnonzero(np.tile(np.nanmax(np.abs(z), 0) < 1e-9, 2 * self.window + 1))
        self.columns_[constant], bias[constant] = 0.0, 0.0  # filled with their one value, whatever the row
        self.intercept_ = bias + self.columns_ @ self.row_mean_

        self.ridge_, self.validation_rmse_ = 1.0, math.nan
        if hidden.any():
            chosen = np.flatnonzero(hidden.any(1))[:HELD_OUT_ROWS]
            if self.window:  # neighbours matter: a run of consecutive rows
                chosen = np.arange(min(rows, 4 * HELD_OUT_ROWS))
            errors = []
            for ridge in RIDGES:
                difference = (self._complete(shown[chosen], ridge) - z[chosen])[hidden[chosen]]
                errors.append(float(np.sqrt(np.mean(np.square(difference)))))
            best = int(np.argmin(errors))
            self.ridge_, self.validation_rmse_ = RIDGES[best], errors[best]

    def _hide(self, z: Array, random: Any) -> NDArray[np.bool_]:
        """Cells held out: never the last one of a row's or column's kind that the model needs to see."""
        hidden = np.zeros(z.shape, dtype=bool)
        observed = np.flatnonzero(~np.isnan(z))
        count = int(self.validation_fraction * len(observed))
        hidden.flat[random.permutation(observed)[:count]] = True
        hidden &= ((~np.isnan(z)) & ~hidden).any(0)  # a column keeps at least one observed cell
        return hidden

    def _complete(self, z: Array, ridge: float) -> Array:
        """The posterior mean of every base cell (module docstring)."""
        table = self._features(z)
        base = slice(z.shape[1] * self.window, z.shape[1] * (self.window + 1))  # the row itself among its neighbours
        columns, intercept = self.columns_, self.intercept_
        rank = columns.shape[1]
        weighted = columns / (ridge * self.noise_)[:, None]
        # Of every column, W_j W_j^T: one product with what each row has observed; too large for wide tables.
        few = len(columns) * rank**2 <= 2 * BLOCK_NUMBERS
        squares = (weighted[:, :, None] * columns[:, None, :]).reshape(len(columns), -1) if few else None
        size = max(1, min(ROW_BLOCK, BLOCK_NUMBERS // rank**2))
        out = np.empty((len(z), z.shape[1]))
        for begin in range(0, len(z), size):
            block = table[begin : begin + size]
            seen = ~np.isnan(block)
            if squares is not None:
                precision = (seen.astype(float) @ squares).reshape(-1, rank, rank) + self.row_precision_
            else:
                precision = np.stack([weighted[row].T @ columns[row] for row in seen]) + self.row_precision_
            target = np.where(seen, block - intercept, 0.0) @ weighted
            u = np.linalg.solve(precision, target[..., None])[..., 0]
            out[begin : begin + size] = u @ columns[base].T + intercept[base]
        return out

    # ------------------------------------------------------------------ files

    _saved_arrays = (
        "kept_", "mean_", "scale_", "product_stats_", "columns_", "intercept_", "noise_", "row_mean_", "row_precision_"
    )  # fmt: skip
    _saved_values = ("products_", "ridge_", "validation_rmse_", "n_features_in_")

    def _take_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        super()._take_arrays(arrays)
        self.products_ = [(int(i), int(j)) for i, j in self.products_]
        if "feature_names_in_" in arrays:
            self._check_shapes({"feature_names_in_": (self.n_features_in_,)})
        count, products, k = int(self.kept_.sum()), len(self.products_), self.columns_.shape[1]
        lifted = count * (2 * self.window + 1) + products
        self._check_shapes({"kept_": (self.n_features_in_,), "mean_": (count,), "scale_": (count,)})
        self._check_shapes({"product_stats_": (4, products), "columns_": (lifted, k), "intercept_": (lifted,)})
        self._check_shapes({"noise_": (lifted,), "row_mean_": (k,), "row_precision_": (k, k)})

    # ------------------------------------------------------------------ checks

    def _rank(self, inputs: int, shape: tuple[int, int]) -> int:
        largest = min(shape)
        if self.rank == "auto":
            return min(largest, MAX_RANK, 3 * inputs + 1 if self.products_ else max(1, 3 * shape[1] // 4))
        if int(self.rank) > largest:
            raise ValueError(
                f"LowRankImputer: rank must be 'auto' or at most {largest} for a (lifted) table of shape {shape}, "
                f"got {self.rank}"
            )
        return int(self.rank)

    def _table(self, method: str, X: ArrayLike, mask: ArrayLike | None, reset: bool) -> Array:
        if validate_data is not None:
            table = validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite=False, copy=True)
        else:
            table = self._validate_data(X, reset=reset, dtype=np.float64, force_all_finite=False, copy=True)
        if not np.isnan(self.missing_values):
            dtypes = getattr(X, "dtypes", None)  # of a data frame, one a column
            held = [as_held(dtype, self.missing_values) for dtype in ([np.asarray(X).dtype] if dtypes is None else dtypes)]
            table[table == np.array(held)] = np.nan
        if mask is not None:
            observed = np.asarray(mask)
            if observed.dtype != np.bool_ or observed.shape != table.shape:
                raise ValueError(
                    f"LowRankImputer.{method}: mask must be boolean (True: observed) of shape {table.shape}, "
                    f"got {observed.dtype} of shape {observed.shape}"
                )
            table[~observed] = np.nan
        infinite = np.argwhere(np.isinf(table))
        if len(infinite):
            i, j = infinite[0]
            raise ValueError(
                f"LowRankImputer.{method}: X must not contain infinity, got {table[i, j]} in row {i}, column {j} "
                f"({len(infinite)} such cells); mark them as missing"
            )
        return table

    def _check_parameters(self) -> None:
        def refuse(name: str, wanted: str) -> None:
            raise ValueError(f"LowRankImputer: {name} must be {wanted}, got {getattr(self, name)!r}")

        def check(name: str, fine: bool, wanted: str) -> None:
            if not fine:
                refuse(name, wanted)

        rank, degree = self.rank, self.degree
        automatic = isinstance(rank, str) and rank == "auto"
        check("rank", automatic or (is_integer(rank) and rank >= 1), "'auto' or an integer of at least 1")  # type: ignore[operator]
        check("degree", (is_integer(degree) and degree in (1, 2)) or degree == "auto", "'auto', 1 or 2")
        check("window", is_integer(self.window) and self.window >= 0, "an integer of at least 0")
        check("degree", not self.window or degree != 2, "1 (or 'auto') where a window is given")
        check_common(self)
        for name in ("row_penalty", "column_penalty"):
            value = getattr(self, name)
            check(name, is_number(value) and 0 <= value < np.inf, "a finite number of at least 0")
        share = self.validation_fraction
        check("validation_fraction", is_number(share) and 0 <= share < 1, "from 0 to below 1")
        missing = self.missing_values
        check("missing_values", is_number(missing) and not np.isinf(missing), "NaN or a finite number")

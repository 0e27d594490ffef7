"""What gradient descent really does, every n steps, beside what the theory says; kept as .npz with a JSON header.

The arrays of a recording, T records of an L-layer model:

    step, loss, rank               (T,)       rank: singular values of X above rank_tol times the largest
    product.singular_values        (T, n)     of X
    layer<l>.singular_values       (T, n_l)   of W_l; l from 1
    layer<l>.left_vectors, right_vectors      (T, ., vectors) singular vectors of W_l, where asked for
    rho, rho_measured, rho_spread  (T, L)     (6); the value repeated d - rank times, and how far apart its copies are
    off_block                      (T, L)     max(|U_1^T W V_2|_F, |U_2^T W V_1|_F): 0 by (5)
    stationary                     (T, L)     max(|W V_2 - rho U_2|, |W^T U_2 - rho V_2|), spectral, measured rho: 0 by (5)
    angle_invariant                (T, L)     largest angle of the repeated value's singular subspaces to their start
    angle_top                      (T, L)     the same of the top rank / 2 right singular vectors, to their first record
    distance, distance_predicted   (T,)       |X - X_twin|_F; sqrt(d - rank) prod rho_l
    twin.loss                      (T,)

NaN stands for what is not defined: rho away from the theorem's assumptions, an angle while the subspace is not separated.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..files import InputError, PathLike, check_output, write_arrays
from .losses import SquaredLoss
from .model import DeepFactorization
from .theory import invariant_frames, principal_angles, repeated_singular_value, rho_step
from .training import Descent

FORMAT, VERSION = "lowrank_kernels.factorization.recording", 1
SEPARATED = 1e-6  # a singular subspace is defined where the gap to the next value is more than this times the largest


@dataclass(frozen=True)
class Recording:
    """Arrays of the module's table, and a header: model, settings, format."""

    header: dict[str, Any]
    arrays: dict[str, NDArray[np.float64]]

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name not in self.arrays:
            raise KeyError(f"{name!r} was not recorded; there are: {', '.join(self.arrays)}")
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.arrays["step"])

    def save(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Write a ``.npz`` without pickles, whole or not at all; its ``header`` is a JSON text.

        Raises:
            InputError: another extension.
            OutputError: the file exists and ``overwrite`` is not set, or cannot be written.
        """
        header = json.dumps({"format": FORMAT, "version": VERSION, **self.header})
        write_arrays(path, {"header": np.array(header), **self.arrays}, overwrite)

    @classmethod
    def load(cls, path: PathLike) -> Recording:
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises:
            InputError: a file that is not there, damaged, of another kind or a newer version.
        """
        try:
            data = np.load(path, allow_pickle=False)
            if not isinstance(data, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            with data:
                arrays = {name: data[name] for name in data.files}
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise InputError(f"{path}: not a recording (.npz): {error}") from error
        try:
            header = json.loads(str(arrays.pop("header")))
            known = header.pop("format") == FORMAT
            version = int(header.pop("version"))
        except (KeyError, ValueError, TypeError, AttributeError):
            known, header, version = False, {}, 0
        if not known:
            raise InputError(f"{path}: not a recording of a factorization: its header is not of format {FORMAT}")
        if version > VERSION:
            raise InputError(f"{path}: version {version} of the format is newer than {VERSION}: update lowrank-kernels")
        lengths = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
        if "step" not in lengths or set(lengths.values()) != {lengths["step"]}:
            raise InputError(f"{path}: the arrays must all have one row a record, got {lengths}")
        if any(array.dtype.kind not in "fiu" for array in arrays.values()):
            raise InputError(f"{path}: the arrays must hold numbers")
        return cls(header, arrays)


class Recorder:
    """Keeps what the module's table lists, every ``every`` steps and at the end of :func:`train`.

    Args:
        every: steps between records.
        rank: width ``2 rh`` of the learning block, for what compares with Theorem 2.1. By default the twin's width, else twice
            the rank of a fully observed target; without either, or for a model that is not square, linear and of full
            width at its start, those arrays are not kept.
        vectors: how many left and right singular vectors of each layer to keep.
        twin: a model that is trained beside the recorded one, with the same rate, weight decay and optimizer: its loss and
            its distance are kept. It is changed.
        twin_gamma: gamma of a compressed twin.
        rank_tol: see ``rank``.

    Raises:
        ValueError: numbers out of range; a rank that :meth:`DeepFactorization.compress` refuses (when training starts).

    Note:
        A record costs one SVD of each layer and of X. Several calls of ``train`` on one model continue the recording.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import DeepFactorization, Recorder, SquaredLoss, train
        >>> g = torch.Generator().manual_seed(0)
        >>> loss = SquaredLoss(torch.randn(10, 1, generator=g).double() @ torch.randn(1, 10, generator=g).double())
        >>> model = DeepFactorization(3, 10, init_scale=1.0, generator=g)
        >>> recorder = Recorder(every=10, twin=model.compress(loss, rank=2))
        >>> _ = train(model, loss, learning_rate=0.02, steps=50, recorder=recorder)
        >>> r = recorder.recording()
        >>> r["step"].astype(int).tolist(), r["layer1.singular_values"].shape
        ([0, 10, 20, 30, 40, 50], (6, 10))
        >>> bool(abs(r["rho"] - r["rho_measured"]).max() < 1e-12), bool(r["off_block"].max() < 1e-12)
        (True, True)
        >>> bool(abs(r["distance"] - r["distance_predicted"]).max() < 1e-12)
        True
    """

    def __init__(
        self,
        every: int = 1,
        *,
        rank: int | None = None,
        vectors: int = 0,
        twin: DeepFactorization | None = None,
        twin_gamma: float = 0.0,
        rank_tol: float = 1e-3,
    ) -> None:
        if every < 1:
            raise ValueError(f"Recorder: every must be at least 1, got {every}")
        if vectors < 0:
            raise ValueError(f"Recorder: vectors must be at least 0, got {vectors}")
        if not 0 < rank_tol < 1:
            raise ValueError(f"Recorder: rank_tol must be between 0 and 1, got {rank_tol}")
        self.every, self.rank, self.vectors, self.twin, self.rank_tol = every, rank, vectors, twin, rank_tol
        self.twin_gamma = twin_gamma
        self.records: list[dict[str, Any]] = []
        self._model: DeepFactorization | None = None
        self._frames: list[Tensor] = []
        self._top: dict[int, Tensor] = {}  # of each layer at its first record
        self._rho: Tensor | None = None
        self._end = 0  # step of the model as train() left it
        self._mark: tuple[int, Tensor | None, list[Tensor]] = (0, None, [])

    # ------------------------------------------------------------------ called by train()

    def begin(self, run: Descent) -> None:
        """Take the start of a run; a second one of the same model continues the recording."""
        if self._model is None:
            self._model, self._first = run.model, 0
            self._find_frames(run)
        elif self._model is not run.model:
            raise ValueError("Recorder: one recorder records one model; make another for another model")
        else:
            self._first = self._end
        self._run, self._rho_steps, self._twin_run = run, 0, None
        if self._rho is not None and not self._in_theory(run):
            self._rho = None
        if self.twin is not None:
            self._twin_run = Descent(
                self.twin,
                run.loss,
                learning_rate=run.learning_rate,
                weight_decay=run.weight_decay,
                gamma=self.twin_gamma,
                optimizer=run.make_optimizer,
                check=False,
            )

    def mark(self) -> None:
        """The present state is what :func:`train` would go back to."""
        run = self._run
        self._advance_rho(run)
        self._advance_twin()
        twin = [] if self.twin is None else [factor.detach().clone() for factor in self.twin.factors()]
        self._mark, self._end = (run.steps, self._rho, twin), self._first + run.steps

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the marked state, with the model: what was recorded since is not of the weights that were kept."""
        self._rho_steps, self._rho, twin = self._mark
        self.records = [record for record in self.records if record["step"] <= self._end]
        for factor, value in zip([] if self.twin is None else self.twin.factors(), twin, strict=True):
            factor.copy_(value)

    @staticmethod
    def _in_theory(run: Descent) -> bool:
        return run.plain and isinstance(run.loss, SquaredLoss) and run.loss.weights is None

    def _find_frames(self, run: Descent) -> None:
        model, loss = run.model, run.loss
        full = isinstance(loss, SquaredLoss) and loss.weights is None
        given = self.rank if self.rank is not None or self.twin is None else self.twin.width
        if given is None and full:
            assert isinstance(loss, SquaredLoss)
            given = 2 * loss.target_rank
            given = given if 0 < given < min(model.shape) else None
        square = model.shape[0] == model.shape[1]
        if given is None or not (model.linear and square and model.form == "full-width" and model.width == model.shape[0]):
            if self.rank is not None:
                raise ValueError(f"Recorder: rank must be None but for a square linear model of full width, got {self.rank}")
            return
        if given >= model.shape[0]:
            raise ValueError(f"Recorder: rank must be below d = {model.shape[0]}: nothing is invariant else, got {given}")
        self.rank = given
        self._frames = invariant_frames(model, loss, given, truncate=True)
        rank_enough = full and isinstance(loss, SquaredLoss) and given >= 2 * loss.target_rank
        if rank_enough and self._in_theory(run):
            self._rho = torch.tensor(model.init_scale, dtype=torch.float64)

    def due(self, step: int, last: bool) -> bool:
        """Whether this step is to be recorded."""
        if step == 0 and self.records and self.records[-1]["step"] == self._first:
            return False  # the end of the run before
        return last or step % self.every == 0

    @torch.no_grad()
    def observe(self) -> None:
        """Record the present state."""
        run, model = self._run, self._run.model
        x, loss = model().detach().double(), float(run.evaluate())
        if not math.isfinite(loss) or not bool(torch.isfinite(x).all()):  # train() says so at its next check
            return
        s = _singular_values(model, x)
        record: dict[str, Any] = {"step": self._first + run.steps, "loss": loss}
        record["rank"] = int((s > self.rank_tol * s[0]).sum()) if float(s[0]) > 0 else 0
        record["product.singular_values"] = s.cpu().numpy()
        if self._frames:
            self._advance_rho(run)
            record["rho"] = np.full(model.depth, math.nan) if self._rho is None else self._rho.numpy().copy()
        layers = [self._layer(index, record) for index in range(model.depth)]
        for name in layers[0]:
            record[name] = np.array([layer[name] for layer in layers])
        if self._twin_run is not None:
            self._observe_twin(x, record)
        self.records.append(record)

    def _advance_rho(self, run: Descent) -> None:
        if self._rho is None:
            return
        divisor = run.loss.divisor if isinstance(run.loss, SquaredLoss) else 1
        for _ in range(run.steps - self._rho_steps):
            self._rho = rho_step(self._rho, run.learning_rate, run.weight_decay, divisor)
        self._rho_steps = run.steps

    def _layer(self, index: int, record: dict[str, Any]) -> dict[str, float]:
        """Singular values and vectors of a layer into the record; returns what is one number a layer."""
        weight = self._run.model.weights[index].detach().double()
        name = f"layer{index + 1}"
        if not self._frames and not self.vectors:
            record[f"{name}.singular_values"] = torch.linalg.svdvals(weight).cpu().numpy()
            return {}
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        record[f"{name}.singular_values"] = s.cpu().numpy()
        if self.vectors:
            record[f"{name}.left_vectors"] = u[:, : self.vectors].cpu().numpy()
            record[f"{name}.right_vectors"] = vh[: self.vectors].t().cpu().numpy()
        return self._against_theory(index, weight, u, s, vh.t()) if self._frames else {}

    def _against_theory(self, index: int, weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> dict[str, float]:
        assert self.rank is not None
        k = self.rank
        before, after = self._frames[index], self._frames[index + 1]
        rho, spread, place = repeated_singular_value(s, len(s) - k)
        sign = math.copysign(1.0, float(torch.trace(after[:, k:].t() @ weight @ before[:, k:])))
        moved, back = weight @ before[:, k:], weight.t() @ after[:, k:]
        off = max(float((after[:, :k].t() @ moved).norm()), float((back.t() @ before[:, :k]).norm()))
        still = (moved - sign * rho * after[:, k:], back - sign * rho * before[:, k:])
        stationary = max(float(torch.linalg.matrix_norm(x, 2)) for x in still)
        end = place + len(s) - k
        gap = min(
            float(s[place - 1] - s[place]) if place else math.inf, float(s[end - 1] - s[end]) if end < len(s) else math.inf
        )
        angle = math.nan
        if gap > SEPARATED * float(s[0]):
            pairs = ((u[:, place:end], after[:, k:]), (v[:, place:end], before[:, k:]))
            angle = max(float(principal_angles(*pair).max()) for pair in pairs)
        top, r = math.nan, k // 2
        if float(s[r - 1] - s[r]) > SEPARATED * float(s[0]):
            first = self._top.setdefault(index, v[:, :r].clone())
            top = float(principal_angles(v[:, :r], first).max())
        return {
            "rho_measured": sign * rho,
            "rho_spread": spread,
            "off_block": off,
            "stationary": stationary,
            "angle_invariant": angle,
            "angle_top": top,
        }

    def _advance_twin(self) -> None:
        twin = self._twin_run
        while twin is not None and twin.steps < self._run.steps:
            twin.step()

    def _observe_twin(self, x: Tensor, record: dict[str, Any]) -> None:
        twin = self._twin_run
        assert twin is not None
        self._advance_twin()
        record["twin.loss"] = float(twin.evaluate())
        record["distance"] = float((x - twin.model().detach().double()).norm())
        if self._frames and self.rank is not None:
            width = x.shape[0] - self.rank
            predicted = math.nan if self._rho is None else math.sqrt(width) * abs(float(self._rho.prod()))
            record["distance_predicted"] = predicted

    # ------------------------------------------------------------------ results

    def recording(self) -> Recording:
        """What was recorded so far.

        Raises:
            ValueError: nothing was.
        """
        if not self.records or self._model is None:
            raise ValueError("Recorder: nothing was recorded; pass recorder=... to train() first")
        names = self.records[-1].keys()
        arrays = {name: np.array([record[name] for record in self.records], dtype=np.float64) for name in names}
        run, model = self._run, self._model
        reduction = run.loss.reduction if isinstance(run.loss, SquaredLoss) else "function"
        header = {
            "model": model.extra_repr(),
            "depth": model.depth,
            "shape": list(model.shape),
            "width": model.width,
            "form": model.form,
            "init_scale": list(model.init_scale),
            "activation": None if model.activation is None else str(model.activation),
            "dtype": str(model.weights[0].dtype).removeprefix("torch."),
            "loss": repr(run.loss) if isinstance(run.loss, SquaredLoss) else "function",
            "reduction": reduction,
            "learning_rate": run.learning_rate,
            "weight_decay": run.weight_decay,
            "gamma": run.gamma,
            "optimizer": "gradient descent" if run.plain else type(run.optimizer).__name__,
            "rank": self.rank,
            "rank_tol": self.rank_tol,
            "twin": None if self.twin is None else self.twin.extra_repr(),
        }
        return Recording(header, arrays)

    def save(self, path: PathLike, *, overwrite: bool = False) -> None:
        """:meth:`Recording.save` of what was recorded so far."""
        check_output(path, overwrite, (".npz",))
        self.recording().save(path, overwrite=overwrite)


def _singular_values(model: DeepFactorization, x: Tensor) -> Tensor:
    """Of the product; of a compressed linear one from its k x k core alone."""
    if model.left is None or model.right is None or not model.linear:
        return torch.linalg.svdvals(x)
    core = model.weights[0].detach().double()
    for weight in model.weights[1:]:
        core = weight.detach().double() @ core
    outer = [torch.linalg.qr(y.detach().double(), mode="r").R for y in (model.left, model.right.t())]
    return torch.linalg.svdvals(outer[0] @ core @ outer[1].t())

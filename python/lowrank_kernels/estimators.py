"""What the estimators share: saving and loading, parameter checks, standardisation and the progress bar."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from . import solver
from .files import extra, write_arrays
from .processes import Team

UNSAVED = ("progress", "random_state", "checkpoint")  # of this machine or this run
Self = TypeVar("Self", bound="SavedEstimator")


class SavedEstimator:
    """``save`` and ``load`` of a fitted estimator: an ``.npz`` file of arrays and a JSON header, nothing executable."""

    _saved_arrays: tuple[str, ...] = ()
    _saved_values: tuple[str, ...] = ()  # what JSON can hold
    status_: solver.Status
    feature_names_in_: Any  # an array of objects, where fit was given names
    get_params: Callable[[], dict[str, Any]]  # of scikit-learn's BaseEstimator

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write the fitted estimator to an ``.npz`` file, atomically; it holds arrays and JSON only, nothing executable.

        ``progress`` is not kept, nor a ``random_state`` that is not an int.
        """
        check_is_fitted(self)
        parameters = {k: v for k, v in self.get_params().items() if k not in UNSAVED}
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
        names = getattr(self, "feature_names_in_", None)
        arrays = {name: getattr(self, name) for name in self._saved_arrays}
        return arrays if names is None else {**arrays, "feature_names_in_": names.astype(str)}

    def _take_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Set the attributes of ``_arrays`` and refuse what does not fit together."""
        for name in self._saved_arrays:
            setattr(self, name, arrays[name])
        if "feature_names_in_" in arrays:
            self._take_names(arrays["feature_names_in_"].astype(object))

    def _take_names(self, names: NDArray[np.object_] | None) -> None:
        """As scikit-learn: the attribute is there where names are."""
        vars(self).pop("feature_names_in_", None)
        if names is not None:
            self.feature_names_in_ = names

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


def mean_and_scale(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None = None, team: Team | None = None
) -> tuple[float, float]:
    """Mean and standard deviation, the mean's size (or 1) for constant values. Squares neither overflow nor underflow.

    Of the values of all processes of a team; some of them may have none.
    """
    team = team or Team()

    def largest_of(x: NDArray[np.float64]) -> float:
        return max(team.meet(float(x.max(initial=0.0))))

    def average(x: NDArray[np.float64]) -> float:
        if team.size == 1:
            return float(np.average(x, weights=weights))
        said = team.meet((float(x.sum()), len(x)) if weights is None else (float((x * weights).sum()), float(weights.sum())))
        return sum(part for part, _ in said) / sum(weight for _, weight in said)

    largest = largest_of(np.abs(values)) or 1.0
    scaled = values / largest
    mean = average(scaled)
    spread = largest_of(np.abs(scaled - mean))
    if spread <= 1e-12:  # constant up to rounding
        return mean * largest, abs(mean * largest) or 1.0
    root = math.sqrt(average(((scaled - mean) / spread) ** 2))
    return mean * largest, root * spread * largest


def in_units(record: dict[str, float], scale: float) -> dict[str, float]:
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

        return lambda step, record: report(step, self.max_steps, in_units(record, self.scale))

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(*error)

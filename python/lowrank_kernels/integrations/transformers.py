"""Adapted models in transformers' ``Trainer``: the optimizer with the rates of every role, reports on ranks and on divergence.

    lrk.adapt(model, rank=8, modules_to_train=["classifier"])   # or peft.get_peft_model with DeepLoraConfig
    lrk.fit_head(model, loader, steps=30)                       # a new head first
    lrk.compress_(model, [batch])
    trainer = Trainer(model, args, train_dataset=data, optimizers=trainer_optimizer(model, args))
    trainer.add_callback(RankReportCallback(every=100, log=trainer.log))
    trainer.train()

The model stays a transformers model: Trainer saves all of its weights, frozen ones and adapters, and resumes from them bit for
bit into a model that was adapted in the same way. ``from_pretrained`` on such a checkpoint alone does not know the adapters:
adapt first, or keep the adapter by :func:`lowrank_kernels.save_adapter`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..analysis import RankReport, rank_report
from ..files import PathLike, check_output, extra, read_head, write_atomically
from ..optim import BETAS, AdamWithSGD, DivergenceWatch, parameter_groups, watch_divergence

extra("transformers", "lowrank_kernels.integrations.transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

__all__ = ["DivergenceCallback", "RankReportCallback", "trainer_optimizer"]

Log = Callable[[dict[str, float]], None]


def trainer_optimizer(
    model: nn.Module, args: TrainingArguments, *, lr: float | None = None, weight_decay: float | None = None, **groups: Any
) -> tuple[Optimizer, None]:
    r"""What ``Trainer(optimizers=...)`` takes, for an adapted model: the optimizer that the arguments name, on
    :func:`~lowrank_kernels.parameter_groups`.

    Args:
        model: adapted by :func:`lowrank_kernels.adapt`, or a PEFT model with Deep LoRA.
        args: the ``TrainingArguments`` of the Trainer; ``optim``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` count,
            but Deep LoRA's groups keep their betas, in the mode "paper" their epsilon of 1e-6.
        lr: base rate; default ``args.learning_rate``, whose own default 5e-5 is far too small for Deep LoRA (1e-2).
        weight_decay: default ``args.weight_decay``.
        **groups: of ``parameter_groups``: ``gamma``, ``loraplus_ratio`` (LoRA+), ``embedding_lr``, ``reference_rank``,
            ``head_lr``, ``outer`` ("sgd" needs one of AdamW's names in ``args.optim``).

    Returns:
        ``(optimizer, None)``: without a scheduler Trainer makes the one of its arguments, which scales all rates alike.

    Raises:
        ValueError: ``args.optim`` chooses its own parameters (GaLore, LOMO, ...), or is not AdamW with ``outer="sgd"``; what
            ``parameter_groups`` refuses.

    Note:
        Give the model its final dtype before. Trainer clips gradients to ``max_grad_norm`` = 1 over all groups together.

    Example:
        >>> import tempfile, torch, lowrank_kernels as lrk
        >>> from lowrank_kernels.integrations.transformers import trainer_optimizer
        >>> from transformers import TrainingArguments
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
        >>> report = lrk.adapt(model, rank=16, target_modules=["0"], modules_to_train=["2"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, learning_rate=1e-2, use_cpu=True, report_to="none")
        ...     optimizer, scheduler = trainer_optimizer(model, args)
        >>> type(optimizer).__name__, [(group["name"], round(group["lr"], 5)) for group in optimizer.param_groups]
        ('AdamW', [('deeplora.outer.16', 0.00212), ('deeplora.core.16', 0.005), ('other', 0.001), ('other.vectors', 0.001)])
    """
    wanted: Any = model  # of any class
    optim = getattr(args.optim, "value", args.optim)
    kind, given = Trainer.get_optimizer_cls_and_kwargs(args, wanted)
    options: dict[str, Any] = dict(given)
    if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys():
        raise ValueError(
            f"trainer_optimizer: optim={optim!r} chooses its own parameters; use an optimizer of plain groups, "
            "such as adamw_torch"
        )
    if groups.get("outer") == "sgd":
        if kind is not torch.optim.AdamW:
            raise ValueError(f"trainer_optimizer: outer='sgd' goes with an AdamW of torch, got optim={optim!r}")
        kind = AdamWithSGD
    options["lr"] = args.learning_rate if lr is None else lr
    decay = args.weight_decay if weight_decay is None else weight_decay
    made = parameter_groups(model, options["lr"], weight_decay=decay, **groups)
    if not isinstance(options.get("eps"), float):  # another optimizer's epsilon is another thing, Adafactor's are two
        for group in made:
            group.pop("eps", None)
    if len(options.get("betas", ())) != len(BETAS):  # of another kind
        for group in made:
            group.pop("betas", None)
    return kind(made, **options), None


class RankReportCallback(TrainerCallback):
    """Reports how much of their rank the updates use, every so many steps and at the end of the training.

    Args:
        every: optimizer steps between two reports.
        path: a ``.json`` file for all of them, ``[{"step": ..., "layers": [...]}, ...]``, written whole each time by the main
            process. A resumed training goes on with it; any other refuses an existing file.
        overwrite: replace that file.
        log: called with ``update_rank_mean``, ``update_rank_max``, ``updates_below_threshold`` (a share) and
            ``update_ratio_max``, the largest s1(delta) / s1(W); give it ``trainer.log``.
        absolute, relative, adapter: of :func:`~lowrank_kernels.rank_report`.

    Attributes:
        reports: step -> :class:`~lowrank_kernels.analysis.RankReport`.

    Raises:
        ValueError: ``every`` below 1. InputError, OutputError: the file's name or place, at once or when training begins.

    Example:
        >>> from lowrank_kernels.integrations.transformers import RankReportCallback
        >>> callback = RankReportCallback(every=50)
        >>> callback.reports
        {}
    """

    def __init__(
        self,
        every: int = 100,
        path: PathLike | None = None,
        *,
        overwrite: bool = False,
        log: Log | None = None,
        absolute: float = 1e-2,
        relative: float = 1e-2,
        adapter: str | None = None,
    ) -> None:
        _check_every("RankReportCallback", every)
        if path is not None:
            check_output(path, overwrite=True, suffixes=(".json",))  # whether it may exist depends on whether we resume
        self.every, self.path, self.overwrite, self.log = every, path, overwrite, log
        self.options: dict[str, Any] = {"absolute": absolute, "relative": relative, "adapter": adapter}
        self.reports: dict[int, RankReport] = {}
        self._written: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        rank_report(model, **self.options)  # refuses what it cannot report on before the long work
        self._written = []
        self.reports = {step: report for step, report in self.reports.items() if step <= state.global_step}  # of this training
        if self.path is None or not state.is_world_process_zero:
            return
        if state.global_step == 0:
            check_output(self.path, self.overwrite, (".json",))
            return
        try:
            written = json.loads(read_head(self.path, None))
            self._written = [row for row in written if row["step"] <= state.global_step]
        except (ValueError, TypeError, LookupError):
            check_output(self.path, self.overwrite, (".json",))  # not there, or not ours

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self._report(state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step not in self.reports:
            self._report(state, model)

    def _report(self, state: TrainerState, model: nn.Module) -> None:
        report = self.reports[state.global_step] = rank_report(model, **self.options)  # by all processes of a sharded model
        if self.path is not None and state.is_world_process_zero:
            self._written.append({"step": state.global_step, "layers": _plain(report.to_dicts())})
            data = json.dumps(self._written, indent=1, allow_nan=False).encode()
            write_atomically(self.path, lambda handle: handle.write(data), overwrite=True)
        if self.log is not None:
            ranks = [row.absolute_rank for row in report.layers if row.absolute_rank is not None]
            found = {"update_ratio_max": _largest(row.ratio for row in report.layers)}
            if ranks:
                found["update_rank_mean"] = sum(ranks) / len(ranks)
                found["update_rank_max"] = float(max(ranks))
                found["updates_below_threshold"] = ranks.count(0) / len(ranks)
            self.log(found)


class DivergenceCallback(TrainerCallback):
    r"""Warns where an update outgrows its frozen weight, :math:`s_1(\Delta) > limit \cdot s_1(W)`, and can stop the training.

    Args:
        every: optimizer steps between two looks.
        limit: largest accepted ratio.
        stop: end the training once a ratio is above the limit or not finite.
        log: called with ``update_ratio_max`` after each look; give it ``trainer.log``.

    Attributes:
        ratios: layer name -> ratio as last measured.
        stopped: the step at which this ended the training, or None.

    Raises:
        ValueError: ``every`` below 1, a limit that is not positive (when training begins).

    Note:
        It is :func:`~lowrank_kernels.watch_divergence` on Trainer's optimizer, removed at the end.

    Example:
        >>> from lowrank_kernels.integrations.transformers import DivergenceCallback
        >>> DivergenceCallback(stop=True).ratios
        {}
    """

    def __init__(self, every: int = 20, limit: float = 5.0, *, stop: bool = False, log: Log | None = None) -> None:
        _check_every("DivergenceCallback", every)
        self.every, self.limit, self.stop, self.log = every, limit, stop, log
        self.stopped: int | None = None
        self._watch: DivergenceWatch | None = None
        self._seen = 0

    @property
    def ratios(self) -> dict[str, float]:
        return {} if self._watch is None else self._watch.ratios

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._remove()  # of a training that an error ended
        stepping = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper does not call hooks of its own
        self._watch, self.stopped, self._seen = watch_divergence(model, stepping, every=self.every, limit=self.limit), None, 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._watch is None or self._watch.looks == self._seen:
            return
        self._seen, largest = self._watch.looks, _largest(self.ratios.values())
        if self.stop and not largest <= self.limit:
            self.stopped = state.global_step
            control.should_training_stop = True
        if self.log is not None:
            self.log({"update_ratio_max": largest})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._watch is not None:
            self._watch.remove()


def _check_every(name: str, every: int) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name}: every must be an integer of at least 1, got {every!r}")


def _largest(ratios: Any) -> float:
    """The largest; NaN where one is."""
    found = list(ratios)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

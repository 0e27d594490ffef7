"""A training step of a whole model on a GPU: a BERT-base-shaped encoder with random weights, 16 x 128 tokens.

Three ways to fine-tune it: the head alone over a frozen body; PEFT's LoRA; Deep LoRA, compressed from one gradient. Both
adapters have rank 8, sit in the same 72 linear layers (query, key, value and the three dense ones of every block), and train
the head as well. AdamW as torch makes it. A step is forward, backward and optimizer.

The paper's Table 2 tells 102 against 106 ms a step, and 12.526 against 12.648 GB, on a V100.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_kernels as lrk

from .cuda import GpuSession, on_gpu
from .harness import Bar, Contender, Outputs, Skipped

BENCH = "encoder_cuda"
HEAD, PEFT, OURS = "frozen body, head alone", "PEFT LoRA", "lowrank_kernels, Deep LoRA"
TARGETS = (
    r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
)
RANK, DEPTH, CHECK_STEPS = 8, 3, 20
PAPER = "the paper's Table 2, on a V100: 102 over 106 ms, 12.526 over 12.648 GB"


class Training:
    """One model, its batch and its optimizer; ``step()`` is what is timed."""

    def __init__(self, session: GpuSession, dtype: torch.dtype) -> None:
        try:
            from transformers import BertConfig, BertForSequenceClassification
        except ImportError as error:
            raise Skipped("transformers is not installed") from error
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99}
        config = BertConfig(**(tiny if session.quick else {}), num_labels=2)
        batch, length = (4, 8) if session.quick else (16, 128)
        torch.manual_seed(0)
        with torch.device(session.device):
            self.model: Any = BertForSequenceClassification(config)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (batch, length), generator=g)
        labels = torch.arange(batch) % 2
        self.batch = {
            "input_ids": ids.to(session.device),
            "attention_mask": torch.ones_like(ids).to(session.device),
            "labels": labels.to(session.device),
        }
        self.device, self.dtype, self.layers = session.device, dtype, config.num_hidden_layers * 6
        self.optimizer: Any = None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        half = self.dtype != torch.float32
        return torch.autocast(self.device, dtype=self.dtype) if half else contextlib.nullcontext()

    def loss(self) -> Tensor:
        with self.autocast():
            return self.model(**self.batch).loss

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def check(self, adapted: dict[str, list[nn.Parameter]], wanted: int) -> None:
        """The loss of the fixed batch falls, and every adapted layer moves; else ValueError."""
        if len(adapted) != wanted:
            raise ValueError(f"{len(adapted)} adapted layers, {wanted} are wanted")
        before = {name: [p.detach().clone() for p in parameters] for name, parameters in adapted.items()}
        losses = [self._quiet_loss(), *(float(self.step()) for _ in range(CHECK_STEPS)), self._quiet_loss()]
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"a loss is not finite: {losses}")
        if not losses[-1] < losses[0]:
            raise ValueError(f"the loss of a fixed batch does not fall: {losses[0]:.4g} before, {losses[-1]:.4g} after")
        still = [name for name, old in before.items() if all(map(torch.equal, old, adapted[name]))]
        if still:
            raise ValueError(f"{len(still)} adapted layers did not change, such as {still[0]}")

    @torch.no_grad()
    def _quiet_loss(self) -> float:
        """Without dropout."""
        self.model.eval()
        loss = float(self.loss())
        self.model.train()
        return loss


def head_alone(training: Training) -> dict[str, list[nn.Parameter]]:
    training.model.requires_grad_(False)
    training.model.classifier.requires_grad_(True)
    training.optimizer = torch.optim.AdamW(training.model.classifier.parameters(), lr=1e-3)
    return {}


def peft_lora(training: Training) -> dict[str, list[nn.Parameter]]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Skipped("peft is not installed") from error
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=TARGETS, modules_to_save=["classifier"])
    training.model = get_peft_model(training.model, config)
    trained = [p for p in training.model.parameters() if p.requires_grad]
    training.optimizer = torch.optim.AdamW(trained, lr=1e-3)
    return {
        name: [module.lora_A["default"].weight, module.lora_B["default"].weight]
        for name, module in training.model.named_modules()
        if hasattr(module, "lora_A")
    }


def deep_lora(training: Training) -> dict[str, list[nn.Parameter]]:
    report = lrk.adapt(training.model, RANK, DEPTH, TARGETS, modules_to_train=["classifier"])
    lrk.compress_(training.model, training.loss)
    training.optimizer = torch.optim.AdamW(lrk.parameter_groups(training.model, lr=1e-2))
    modules = dict(training.model.named_modules())
    return {name: list(modules[name].adapter_parameters("default").values()) for name in report.adapted}


def contender(
    session: GpuSession,
    name: str,
    prepare: Callable[[Training], dict[str, list[nn.Parameter]]],
    dtype: torch.dtype,
    peaks: dict[str, float],
) -> Contender:
    def make(threads: int) -> Callable[[], Any]:
        if not session.rehearsal:
            session.release()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        training = Training(session, dtype)
        training.model.train()
        adapted = prepare(training)
        training.check(adapted, 0 if name == HEAD else training.layers)
        if not session.rehearsal:  # of a step as it repeats: parameters, optimizer state and activations
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            training.step()
            torch.cuda.synchronize()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return training.step

    def outputs(loss: Any) -> Outputs:  # what is right was asked in make(); here, that the steps go on
        return {"finite": torch.isfinite(loss).double()}

    return Contender(name, make, outputs, ours=name == OURS, optional=name == PEFT)


def measure(session: GpuSession, dtype: torch.dtype) -> None:
    words = "float32" if dtype == torch.float32 else f"{str(dtype).removeprefix('torch.')} autocast"
    model = "tiny encoder, 4 x 8 tokens" if session.quick else "BERT-base-shaped encoder, 16 x 128 tokens"
    case = f"training step of a {model}, rank {RANK}, {words}"
    if not session.time_for(f"{BENCH}: {words}", 25.0 if not session.rehearsal else 0.0):
        return
    peaks: dict[str, float] = {}
    ways = {HEAD: head_alone, PEFT: peft_lora, OURS: deep_lora}
    bars = [(OURS, Bar(f"over {PEFT}", 1.0))]
    contenders = [contender(session, name, prepare, dtype, peaks) for name, prepare in ways.items()]
    session.compare_sets(
        BENCH,
        case,
        [contenders],
        oracle=lambda: {"finite": torch.ones((), dtype=torch.float64, device=session.device)},
        graph=False,
        temperature="",
        against=(PEFT,),
        over=PEFT,
        bars=bars,
        memory=(OURS, PEFT),
        dtype=str(dtype).removeprefix("torch."),
        seconds=3.0,
        peaks=peaks,
        note=PAPER,
    )


@on_gpu
def float32(session: GpuSession) -> None:
    measure(session, torch.float32)


@on_gpu
def autocast(session: GpuSession) -> None:
    measure(session, torch.bfloat16)


PARTS = {"float32": float32, "autocast": autocast}

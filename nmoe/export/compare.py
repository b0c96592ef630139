"""The exported model, loaded by the library, against the run's own: both in float32, on the CPU, on the same tokens.

    difference = max over tokens and vocabulary of |library - ours|, over max |ours|

float32 because there a wrong mapping cannot hide behind rounding: bf16 weights are exact in it. A router
sometimes meets two experts whose scores are equal to the last bits, and then each side may choose
another. A token that chose differently, and what comes after it in its sequence, is not compared; that is
allowed for TIES of all choices, where a wrong bias, scale or group would change far more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe import rng
from nmoe.errors import fail
from nmoe.model.router import Router
from nmoe.model.transformer import Transformer

# Two libraries' orders of summation, and rotary angles that the library computes in float32, through many layers.
# The families' tests find 2e-5 at most on small models; a wrong convention gives 1e-2 and more.
DIFFERENCE = 1e-4
TIES = 0.01
SEQUENCES = 8
TOKENS = 64

REPORT = "nothing was exported; this is a fault of nmoe or of the library: report it with these notes"


@attrs.frozen(kw_only=True)
class Comparison:
    """difference: as above. tokens: compared, out of all. ties: choices that differ, out of all choices."""

    difference: float
    tokens: int
    all_tokens: int
    ties: int
    choices: int


@attrs.frozen
class Outputs:
    """logits_TV: (T, V) float32. chosen: each MoE layer's experts, (T, K) int64, ascending in a row."""

    logits_TV: Tensor
    chosen: tuple[Tensor, ...]


def sample(vocab_size: int, context: int) -> Tensor:
    """(B, S) int64: the tokens on which the two are compared, the same every time.

    context: the most that the model is for, and that S is.
    """
    shape = (SEQUENCES, min(TOKENS, context))
    return torch.randint(vocab_size, shape, generator=rng.stream(0, "export"))


@torch.no_grad()
def own_outputs(model: Transformer, ids_BS: Tensor) -> Outputs:
    """What our model gives in evaluation mode."""
    model.eval()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    with _chosen(routers, 0) as chosen:
        logits_TV = model.head(model(ids_BS))
    return Outputs(logits_TV, tuple(chosen))


def load(transformers: ModuleType, directory: Path, architecture: str) -> Any:
    """The model that the library makes of `directory`, as for any user, but in float32 and in evaluation mode.

    RunError N0915 if it is another class, or misses a tensor, or has one left over.
    """
    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    faults = [f"{kind}: {', '.join(sorted(map(str, names))[:8])}" for kind, names in report.items() if names]
    if type(model).__name__ != architecture:
        faults.insert(0, f"it is a {type(model).__name__}, not a {architecture}")
    if faults:
        raise fail(
            "N0915", "the library does not load what was written as it is meant", place=str(directory),
            help=REPORT, notes=faults,
        )  # fmt: skip
    return model


@torch.no_grad()
def library_outputs(model: Any, ids_BS: Tensor) -> Outputs:
    """What a model of `load` gives."""
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    with _chosen(gates, 2) as chosen:
        logits_TV = model(ids_BS).logits.flatten(0, 1)
    return Outputs(logits_TV, tuple(chosen))


@contextmanager
def _chosen(routers: Sequence[torch.nn.Module], place: int) -> Iterator[list[Tensor]]:
    """The experts that each router chooses in one forward pass: what stands at `place` of its result."""
    chosen: list[Tensor] = []

    def note(module: torch.nn.Module, given: Any, result: Any) -> None:
        chosen.append(result[place].sort(dim=1).values)

    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def compare(ours: Outputs, theirs: Outputs, *, sequences: int, place: str) -> Comparison:
    """RunError N0915 with the figures unless the two are one model."""
    differ_TL = torch.stack([(a != b).any(dim=1) for a, b in zip(ours.chosen, theirs.chosen, strict=True)], dim=1)
    # A token sees what stands before it in its sequence, so a choice that differs reaches all that follow.
    touched_BS = differ_TL.any(dim=1).view(sequences, -1).long().cummax(dim=1).values
    same_T = touched_BS.flatten() == 0
    error_T = (theirs.logits_TV - ours.logits_TV).abs().amax(dim=1)
    difference = float(error_T[same_T].max() / ours.logits_TV.abs().max()) if same_T.any() else torch.inf
    result = Comparison(
        difference=difference, tokens=int(same_T.sum()), all_tokens=same_T.numel(),
        ties=int(differ_TL.sum()), choices=differ_TL.numel(),
    )  # fmt: skip
    # Written so that a difference that is not a number fails too.
    if not difference <= DIFFERENCE or result.ties > TIES * result.choices:
        raise fail(
            "N0915", "the exported model does not compute what the run's does", place=place,
            help=REPORT,
            notes=(
                f"largest difference of a logit: {difference:.1e} of the largest logit, where {DIFFERENCE:.0e} may be",
                f"{result.ties} of {result.choices} choices of experts differ",
            ),
        )  # fmt: skip
    return result

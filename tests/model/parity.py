"""Each family beside its stock class: logits, choices of experts, loss and every gradient, from the same weights.

The way there is the exporter's: its config.json, its names, its files, loaded by the library. Everything is
float32, and every one-dimensional tensor and selection bias is random, because zeros and ones hide faults.
`python -m tests.model.parity` prints the table. The library's rotary angles are float32, ours float64, which
the short sequences here keep within the tolerances.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from torch import Tensor

from nmoe.export import compare, library, weights
from nmoe.export.config import config_json
from nmoe.export.hf import pieces, selection_biases
from nmoe.export.names import stock_tensors
from nmoe.model.loss import linear_cross_entropy
from nmoe.plan.families import stock_class
from nmoe.registry.attention import Gqa, Mla
from nmoe.registry.model import Model
from nmoe.registry.rope import Yarn
from tests.model.conftest import GQA, MLA, build, spec


def deepseek(q_lora_rank: int | None, *, num_groups: int = 1, top_groups: int = 1) -> Model:
    model = spec(Mla(q_lora_rank=q_lora_rank, **MLA), top_k=3)
    router = attrs.evolve(model.moe.router, num_groups=num_groups, top_groups=top_groups)
    return attrs.evolve(model, moe=attrs.evolve(model.moe, router=router))


def qwen(*, renormalize: bool = True, dense: int = 1) -> Model:
    model = spec(Gqa(qk_norm=True, rope_theta=500.0, **GQA), top_k=3, shared=0, dense=dense, softmax=True)
    router = attrs.evolve(model.moe.router, renormalize=renormalize)
    return attrs.evolve(model, norm_eps=1e-5, moe=attrs.evolve(model.moe, router=router))


def mixtral(num_kv_heads: int) -> Model:
    attention = Gqa(num_heads=4, num_kv_heads=num_kv_heads, head_dim=16, rope_theta=500.0)
    return attrs.evolve(spec(attention, dense=0, shared=0, softmax=True), norm_eps=1e-5)


def stretched(model: Model, **more: float | bool) -> Model:
    """YaRN from 32 to 256 tokens, with a theta of which the ramp lies between the pairs."""
    yarn = Yarn(factor=8.0, original_context=32, beta_fast=4.0, beta_slow=1.0, **more)
    return attrs.evolve(model, attention=attrs.evolve(model.attention, rope_theta=100.0, rope_scaling=yarn))


def tied(model: Model) -> Model:
    return attrs.evolve(model, tie_embeddings=True)


FAMILIES = {
    "DeepSeek-V3": deepseek(20),
    "DeepSeek-V3, plain queries": deepseek(None),
    "DeepSeek-V3, 2 of 4 groups": deepseek(20, num_groups=4, top_groups=2),
    "Qwen3-MoE": qwen(),
    "Qwen3-MoE, not renormalised": qwen(renormalize=False, dense=0),
    "Mixtral": mixtral(2),
    "Mixtral, one key head": mixtral(1),
    "DeepSeek-V3, YaRN": stretched(deepseek(20)),
    "  mscale 1 and 1": stretched(deepseek(20), mscale=1.0, mscale_all_dim=1.0),
    "  mscale 0.707 and 1.3, tied": tied(stretched(deepseek(20), mscale=0.707, mscale_all_dim=1.3)),
    "  attention_factor 0.9": stretched(deepseek(20), attention_factor=0.9),
    "  not truncated": stretched(deepseek(20), truncate=False),
    "Qwen3-MoE, YaRN, tied": tied(stretched(qwen())),
    "  attention_factor 1.5": stretched(qwen(), attention_factor=1.5),
    "  not truncated, untied": stretched(qwen(), truncate=False),
    "Mixtral, YaRN": stretched(mixtral(2)),
    "Mixtral, tied": tied(mixtral(2)),
}


@attrs.frozen(kw_only=True)
class Parity:
    """Largest errors over the largest value: of the logits, of the loss, of the gradient of one stock tensor, `worst`.

    choices: (token, layer) pairs whose experts differ.
    """

    logits: float
    choices: int
    loss: float
    gradient: float
    worst: str


def parity(model_spec: Model, directory: Path) -> Parity:
    """Writes a random model of model_spec into `directory` and compares, on 40 tokens or all of a stretched context."""
    length = 40 if model_spec.attention.rope_scaling is None else 256
    architecture = stock_class(model_spec).name
    assert architecture is not None
    model = build(model_spec)
    weights.write(directory, pieces(model, torch.float32, architecture), lambda line: None)
    config = config_json(model_spec, architecture, context=length, end_of_document=None)
    weights.write_json(directory / "config.json", config)
    ids = torch.randint(0, 64, (2, length + 1), generator=torch.Generator().manual_seed(3))
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    with library.transformers() as transformers:
        theirs = compare.load(transformers, directory, architecture)
        expected = compare.library_outputs(theirs, inputs)
        wanted = theirs(inputs, labels=inputs, shift_labels=ids[:, 1:].contiguous()).loss * targets.numel()
        wanted.backward()
    found = compare.own_outputs(model, inputs)
    loss = linear_cross_entropy(model(inputs), model.head.weight_VD, targets, chunk_tokens=32)
    loss.backward()
    errors = gradient_errors(architecture, model, theirs)
    worst = max(errors, key=errors.__getitem__)
    return Parity(
        logits=relative(found.logits_TV, expected.logits_TV),
        choices=sum(int((a != b).any(dim=1).sum()) for a, b in zip(found.chosen, expected.chosen, strict=True)),
        loss=relative(loss, wanted),
        gradient=errors[worst],
        worst=worst,
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def gradient_errors(architecture: str, model: torch.nn.Module, theirs: torch.nn.Module) -> dict[str, float]:
    """The error of each stock tensor's gradient; both sides must have the same tensors, biases included."""
    expected = dict(one_by_one(architecture, theirs))
    found = {
        stock: part
        for name, parameter in model.named_parameters()
        for stock, part in stock_tensors(architecture, name, parameter.grad)
    }
    assert found.keys() == expected.keys()
    biases = [name for name, _ in theirs.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == len(selection_biases(model))
    errors = {}
    for name, gradient in expected.items():
        # An expert that no token chose has no gradient on either side.
        errors[name] = relative(found[name], gradient) if gradient.any() else float(found[name].abs().max())
    return errors


def one_by_one(architecture: str, theirs: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The library's gradients under the names of its files, where its experts are apart."""
    mixtral = architecture == "MixtralForCausalLM"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in theirs.named_parameters():
        gradient = parameter.grad
        stem, _, last = name.rpartition(".")
        if mixtral:
            stem = stem.replace(".mlp", ".block_sparse_moe")
        if last == "gate_up_proj":
            for expert, (first, second) in enumerate(part.chunk(2) for part in gradient):
                yield f"{stem}.{expert}.{gate}.weight", first
                yield f"{stem}.{expert}.{up}.weight", second
        elif last == "down_proj":
            yield from ((f"{stem}.{expert}.{down}.weight", part) for expert, part in enumerate(gradient))
        else:
            yield f"{stem}.{last}", gradient


def main() -> None:
    print(f"{'family':30} {'logits':>8} {'choices':>8} {'loss':>8} {'gradient':>8}  of")
    for name, model_spec in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            p = parity(model_spec, Path(directory))
        print(f"{name:30} {p.logits:8.1e} {p.choices:8} {p.loss:8.1e} {p.gradient:8.1e}  {p.worst}")


if __name__ == "__main__":
    main()

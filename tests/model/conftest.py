"""Small models of every kind, built through the registry as a plan builds them."""

import attrs
import pytest
import torch

from nmoe.model.init import initialize
from nmoe.rdep.local import LocalTransport
from nmoe.registry.attention import Gqa, LocalGqa, LocalMla, LocalWindow, Mla
from nmoe.registry.experts import Bf16Experts, Fp32Experts
from nmoe.registry.model import Mlp, Model
from nmoe.registry.moe import Moe
from nmoe.registry.rope import Yarn
from nmoe.registry.router import SigmoidRouter, SoftmaxRouter

MLA = {"num_heads": 3, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
GQA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def spec(attention, *, dtype="fp32", dense=1, layers=3, shared=2, experts=8, top_k=2, moe=True, softmax=False):
    kind = {"fp32": Fp32Experts, "bf16": Bf16Experts}[dtype]
    router = SigmoidRouter(num_experts=experts, top_k=top_k, route_scale=1.5)
    if softmax:
        router = SoftmaxRouter(num_experts=experts, top_k=top_k)
    return Model(
        dtype=dtype,
        vocab_size=64,
        hidden_size=48,
        num_layers=layers,
        attention=attention,
        mlp=Mlp(intermediate_size=64) if dense or not moe else None,
        moe=Moe(num_dense_layers=dense, num_shared_experts=shared, router=router, experts=kind(intermediate_size=40))
        if moe
        else None,
    )


SPECS = {
    "mla": spec(Mla(q_lora_rank=None, **MLA)),
    "mla, compressed queries, windows": spec(
        Mla(q_lora_rank=20, local=LocalWindow(window=7, global_every=2), **MLA), layers=4
    ),
    "gqa": spec(Gqa(**GQA), dense=0, shared=0),
    "gqa, normed, softmax": spec(
        Gqa(qk_norm=True, local=LocalWindow(window=7, global_every=2, sinks=True), **GQA), softmax=True, shared=0
    ),
    "gqa, local mla": spec(Gqa(local=LocalMla(q_lora_rank=None, window=9, global_every=3, **MLA), **GQA), layers=4),
    "mla, local gqa": spec(Mla(q_lora_rank=None, local=LocalGqa(window=5, global_every=2, **GQA), **MLA)),
    "gqa, stretched, tied": attrs.evolve(
        spec(Gqa(rope_scaling=Yarn(factor=4.0, original_context=16), **GQA)), tie_embeddings=True
    ),
    "dense": spec(Gqa(**GQA), moe=False),
    "every expert": spec(Mla(q_lora_rank=None, **MLA), experts=4, top_k=4),
    "bf16": spec(Mla(q_lora_rank=20, local=LocalWindow(window=7, global_every=2), **MLA), dtype="bf16"),
}


def build(model_spec, *, seed=0, recompute="none"):
    """The model with weights drawn wide, norms and router biases random too, so that each of them shows."""
    model = model_spec.build(transport=LocalTransport(), recompute=recompute)
    shapes = [(p.name, p.shape, p.init) for p in model_spec.parameters()]
    initialize(model, shapes, seed=seed, init_std=0.12, residual_init_scale=1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                spread = torch.randn(tensor.shape, generator=generator) * 0.2
                tensor.copy_(spread if name.endswith("bias_E") else 1 + spread)
    return model


@pytest.fixture(params=list(SPECS), ids=str)
def any_spec(request):
    return SPECS[request.param]


@pytest.fixture
def specs():
    return SPECS


@pytest.fixture
def build_model():
    return build


@pytest.fixture
def make_spec():
    return spec

"""The closed table: section -> kind -> spec. A new kind is a new line here, and nothing else adds one.

A section whose only kind is None takes no `kind` key. Array sections (`data.stages`) are named
without an index.
"""

from nmoe.registry import (
    attention,
    batch,
    config,
    data,
    experts,
    model,
    moe,
    optimizer,
    output,
    platform,
    random,
    rope,
    router,
    schedule,
    transport,
)
from nmoe.registry import eval as evaluation
from nmoe.registry.component import Component

TABLE: dict[str, dict[str | None, type[Component]]] = {
    "": {None: config.Config},
    "platform": {None: platform.Platform},
    "random": {None: random.Random},
    "model": {None: model.Model},
    "model.attention": {"mla": attention.Mla, "gqa": attention.Gqa},
    "model.attention.rope_scaling": {"yarn": rope.Yarn},
    "model.attention.local": {None: attention.LocalWindow, "mla": attention.LocalMla, "gqa": attention.LocalGqa},
    "model.attention.local.rope_scaling": {"yarn": rope.Yarn},
    "model.mlp": {None: model.Mlp},
    "model.moe": {None: moe.Moe},
    "model.moe.router": {"sigmoid": router.SigmoidRouter, "softmax": router.SoftmaxRouter},
    "model.moe.experts": {
        "bf16": experts.Bf16Experts,
        "fp8": experts.Fp8Experts,
        "nvfp4": experts.Nvfp4Experts,
        "fp32": experts.Fp32Experts,
    },
    "transport": {"rdep": transport.Rdep},
    "optimizer": {None: optimizer.Optimizer},
    "optimizer.dense": {"adamw": optimizer.AdamW},
    "optimizer.matrices": {"muon": optimizer.Muon},
    "optimizer.router": {"adamw": optimizer.AdamW},
    "optimizer.experts": {"adamw": optimizer.AdamW, "muon": optimizer.Muon},
    "schedule": {"wsd": schedule.Wsd},
    "data": {"corpus": data.Corpus, "shards": data.Shards, "mixture": data.MixtureData},
    "data.stages": {None: data.Stage},
    "data.tokenizer": {
        "bytes": data.BytesTokenizer,
        "packaged": data.PackagedTokenizer,
        "huggingface": data.HuggingFaceTokenizer,
        "tiktoken": data.TiktokenTokenizer,
    },
    "batch": {None: batch.Batch},
    "eval": {None: evaluation.Eval},
    "eval.bpb": {None: evaluation.Bpb},
    "output": {None: output.Output},
    "output.router_collapse": {None: output.RouterCollapse},
}

# Sections that cannot change a bit of training: outside the fingerprint, with everything below them.
OUTSIDE = ("eval", "output")

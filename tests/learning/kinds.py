"""Every kind of router, attention and optimizer, trained on the same text: `make learning` prints the table.

Each is moe.toml with the keys below. A key of [model.attention] or [model.moe.router] under another
`kind` replaces the whole section.
"""

import attrs

from tests.learning.training import MOE, train

FINAL = 24
"""Steps whose mean loss is the final one: 12,288 tokens."""

MUON = ('optimizer.matrices.kind="muon"', 'optimizer.matrices.ns_dtype="fp32"', "optimizer.matrices.lr=1e-2")
MUON_EXPERTS = ('optimizer.experts.kind="muon"', 'optimizer.experts.ns_dtype="fp32"', "optimizer.experts.lr=1e-2")
SOFTMAX = ('model.moe.router.kind="softmax"', "model.moe.router.num_experts=8", "model.moe.router.top_k=2")
GQA = ('model.attention.kind="gqa"', "model.attention.num_heads=4", "model.attention.num_kv_heads=2",
       "model.attention.head_dim=16", "model.attention.rope_theta=100.0")  # fmt: skip
LOCAL = ("model.attention.local.window=8", "model.attention.local.global_every=2")
LOCAL_GQA = ('model.attention.local.kind="gqa"', *LOCAL, "model.attention.local.num_heads=4",
             "model.attention.local.num_kv_heads=2", "model.attention.local.head_dim=16",
             "model.attention.local.rope_theta=100.0")  # fmt: skip
BF16 = ('model.dtype="bf16"', 'model.moe.experts.kind="bf16"', "model.moe.experts.intermediate_size=32")

KINDS: dict[str, tuple[str, ...]] = {
    "base: mla, sigmoid router, muon for matrices": MUON,
    "router: sigmoid without its bias": (*MUON, "model.moe.router.bias_update_rate=0.0"),
    "router: sigmoid, 2 of 4 groups": (*MUON, "model.moe.router.num_groups=4", "model.moe.router.top_groups=2"),
    "router: sigmoid, sequence-wise balance loss": (*MUON, "model.moe.router.sequence_balance_loss=1e-2"),
    "router: softmax": (*MUON, *SOFTMAX),
    "router: softmax, balance loss and z-loss": (
        *MUON, *SOFTMAX, "model.moe.router.balance_loss=1e-2", "model.moe.router.z_loss=1e-3",
    ),
    "router: softmax, not renormalised": (*MUON, *SOFTMAX, "model.moe.router.renormalize=false"),
    "experts: no shared one, first layer dense": (
        *MUON, "model.moe.num_shared_experts=0", "model.moe.num_dense_layers=1", "model.mlp.intermediate_size=96",
    ),
    "model: tied embeddings": (*MUON, "model.tie_embeddings=true", "optimizer.dense.lr=1e-2"),
    "attention: mla with q_lora": (*MUON, "model.attention.q_lora_rank=24"),
    "attention: gqa": (*MUON, *GQA),
    "attention: gqa with qk_norm": (*MUON, *GQA, "model.attention.qk_norm=true"),
    "attention: window of 8 in layer 0": (*MUON, *LOCAL),
    "attention: window of 8 with sinks": (*MUON, *LOCAL, "model.attention.local.sinks=true"),
    "attention: window of 8 as gqa, global mla": (*MUON, *LOCAL_GQA),
    "attention: document mask": (*MUON, "batch.document_mask=true"),
    "optimizer: adamw alone": (),
    "optimizer: muon for experts too": (*MUON, *MUON_EXPERTS),
    "optimizer: bf16 state, adamw": ('optimizer.state_dtype="bf16"',),
    "optimizer: bf16 state, muon, bf16 weights": (*MUON, *MUON_EXPERTS, 'optimizer.state_dtype="bf16"', *BF16),
}  # fmt: skip


@attrs.frozen(kw_only=True)
class Row:
    """Nats a token over the last FINAL steps: the model's, and what counting reaches on the same tokens."""

    name: str
    loss: float
    bigram: float
    unigram: float


def row(name: str) -> Row:
    """Trains one kind."""
    training = train(MOE, KINDS[name])
    columns = (training.losses, training.bigram, training.unigram)
    loss, bigram, unigram = (float(steps[-FINAL:].mean()) for steps in columns)
    return Row(name=name, loss=loss, bigram=bigram, unigram=unigram)


def main() -> None:
    print(f"{'nats a byte, last 12,288 of 71,680 tokens':<46}{'model':>8}{'bigram':>8}{'unigram':>9}")
    for found in map(row, KINDS):
        print(f"{found.name:<46}{found.loss:>8.3f}{found.bigram:>8.3f}{found.unigram:>9.3f}", flush=True)


if __name__ == "__main__":
    main()

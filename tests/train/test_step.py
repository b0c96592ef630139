"""One step against its definition, computed by hand."""

from pathlib import Path

import pytest
import torch

from nmoe.data.loader import TokenBatch
from nmoe.graph import build
from nmoe.plan.resolve import resolve
from nmoe.train.step import run_step

TINY = Path(__file__).with_name("tiny.toml")


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_loss_is_the_mean_over_the_tokens(document_mask):
    """Plain cross-entropy in float64 from the model's hidden states, each document given alone if the mask is on."""
    torch.set_num_threads(1)
    plan = resolve(
        TINY, ["output.run_dir='unused'", "model.dtype='fp32'", "model.moe.experts.kind='fp32'",
               "model.moe.experts.intermediate_size=16", "optimizer.state_dtype='fp32'",
               f"batch.document_mask={str(document_mask).lower()}"],
    )  # fmt: skip
    graph = build(plan)
    batch_config = plan.config.batch
    shape = (batch_config.sequences, batch_config.sequence_length + 1)
    tokens = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3))
    tokens[:, 5], tokens[0, 9], tokens[1, 0] = 256, 256, 256
    inputs_BS, targets_BS = tokens[:, :-1], tokens[:, 1:]
    documents_BS = (inputs_BS == 256).long().cumsum(dim=1)

    graph.model.eval()
    nats = 0.0
    with torch.no_grad():
        for inputs, targets, documents in zip(inputs_BS, targets_BS, documents_BS, strict=True):
            sizes = documents.unique_consecutive(return_counts=True)[1].tolist() if document_mask else [len(inputs)]
            h_SD = torch.cat([graph.model(part[None]) for part in inputs.split(sizes)]).double()
            logits_SV = h_SD @ graph.model.head.weight_VD.double().T
            nats += torch.nn.functional.cross_entropy(logits_SV, targets, reduction="sum").item()

    batch = TokenBatch(
        step=1, input_ids_BS=inputs_BS, targets_BS=targets_BS, document_ids_BS=documents_BS, digest="", num_bytes=1
    )
    result = run_step(graph, batch, step=1, tokens_seen=inputs_BS.numel(), observe=lambda step, phase: None)
    # float32 hidden states, at other shapes of the products: a few times 2^-24 of the loss.
    assert result.loss == pytest.approx(nats / inputs_BS.numel(), rel=2e-6)

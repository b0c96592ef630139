"""Balance losses in a training: what a step descends, what it reports, what does not see them; they do balance."""

import re
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.graph import build
from nmoe.metrics.reader import read_rows
from nmoe.plan.resolve import resolve, resolve_text
from nmoe.train.gate import compare
from nmoe.train.step import run_step

TINY = Path(__file__).with_name("tiny.toml")
FLOAT = (
    "output.run_dir='unused'", "model.dtype='fp32'", "model.moe.experts={kind='fp32', intermediate_size=16}",
    "optimizer.state_dtype='fp32'",
)  # fmt: skip
KINDS = {"sigmoid": {"sequence_balance_loss": 0.5}, "softmax": {"balance_loss": 0.3, "z_loss": 0.05}}
EXPERTS, TOP_K, LENGTH = 8, 2, 16


def text_of(kind, losses, *sets):
    """The tiny plan with another router, as a config."""
    text = resolve(TINY, [*FLOAT, *sets]).to_toml()
    keys = {"num_experts": EXPERTS, "top_k": TOP_K, **losses}
    section = "".join(f"{key} = {value}\n" for key, value in keys.items())
    return re.sub(r"(?<=\[model.moe.router\]\n)(.+\n)+", f'kind = "{kind}"\n{section}', text)


def graph_of(kind, losses, *sets):
    """Its selection biases are not zero: the losses are of the scores without them."""
    torch.set_num_threads(1)
    graph = build(resolve_text(text_of(kind, losses), "config.toml", sets))
    for _, router in graph.routers():
        if router.bias_E is not None:
            router.bias_E.copy_(torch.linspace(-0.05, 0.05, EXPERTS))
    return graph


def stepped(graph, batch):
    """The gradients of one step before the optimizer spends them, by name; the result; each layer's losses."""
    caught = {}

    def observe(step, phase):
        if phase == "optimizer":
            caught.update({name: p.grad.clone() for name, p in graph.model.named_parameters()})

    tokens = graph.tokens_per_step
    result = run_step(graph, batch, step=1, tokens_seen=tokens, observe=observe)
    return caught, result, {layer: router.losses() for layer, router in graph.routers()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_step_descends_cross_entropy_plus_losses(kind, document_mask):
    """Every parameter's gradient against autograd of the whole expression, put together here in float64.

    Cross-entropy and losses of all microbatches become one scalar; logits are taken by hooks, and the routers of the
    model that this goes back through have no losses of their own.
    """
    mask = f"batch.document_mask={str(document_mask).lower()}"
    graph = graph_of(kind, KINDS[kind], mask)
    batch = with_documents(graph.loader.batch(1))
    gradients, result, losses = stepped(graph_of(kind, KINDS[kind], mask), batch)

    logits, routed = {}, dict(graph.routers())
    graph.model.train()
    total_nats, expected = 0.0, {layer: dict.fromkeys(KINDS[kind], 0.0) for layer in routed}
    microbatches = list(
        zip(*(t.split(graph.microbatch.sequences)
              for t in (batch.input_ids_BS, batch.targets_BS, batch.document_ids_BS)), strict=True)
    )  # fmt: skip
    assert len(microbatches) > 1
    whole = 0.0
    for layer, router in routed.items():
        router.balance = None
        router.register_forward_pre_hook(
            lambda module, args, layer=layer: logits.__setitem__(layer, args[0] @ module.weight_ED.T)
        )
    for inputs, targets, documents in microbatches:
        h_TD = graph.model(inputs, documents if document_mask else None)
        nats = torch.nn.functional.cross_entropy(
            (h_TD @ graph.model.head.weight_VD.T).double(), targets.reshape(-1), reduction="sum"
        )
        whole, total_nats = whole + nats / graph.tokens_per_step, total_nats + nats.item()
        share = inputs.numel() / graph.tokens_per_step
        for layer, z in logits.items():
            for name, value in of_papers(kind, z.double()).items():
                whole = whole + KINDS[kind][name] * share * value
                expected[layer][name] += share * value.item()
    graph.optimizer.clear_gradients()
    whole.backward()

    assert result.loss == pytest.approx(total_nats / graph.tokens_per_step, rel=2e-6), "the loss is cross-entropy alone"
    for layer, found in losses.items():
        assert found == pytest.approx(expected[layer], rel=2e-6)
    for name, parameter in graph.model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 2e-5, f"{name}: {error:.2e}"


def with_documents(batch):
    """The batch with document ends in the middle of sequences, beside those that it has."""
    return attrs.evolve(batch, document_ids_BS=batch.document_ids_BS + torch.arange(LENGTH) // 5)


def of_papers(kind, z):
    """The losses of a microbatch by name, vectorised, in z's dtype."""
    if kind == "sigmoid":
        s = torch.sigmoid(z)
        chosen = torch.zeros_like(s).scatter_(1, s.detach().topk(TOP_K, dim=1).indices, 1.0).view(-1, LENGTH, EXPERTS)
        share = (s / s.sum(dim=1, keepdim=True)).view(-1, LENGTH, EXPERTS)
        f, p = EXPERTS / (TOP_K * LENGTH) * chosen.sum(dim=1), share.mean(dim=1)
        return {"sequence_balance_loss": (f * p).sum(dim=1).mean()}
    s = torch.softmax(z, dim=1)
    f = torch.zeros_like(s).scatter_(1, s.detach().topk(TOP_K, dim=1).indices, 1.0).mean(dim=0)
    return {"balance_loss": EXPERTS * (f * s.mean(dim=0)).sum(), "z_loss": torch.logsumexp(z, dim=1).square().mean()}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_evaluation_do_not_see_the_losses(kind):
    """The same hidden states bit for bit with losses and without; nothing is recorded outside of training."""
    with_losses, without = graph_of(kind, KINDS[kind]), graph_of(kind, {})
    assert all(router.balance is None for _, router in without.routers())
    ids_BS = without.loader.batch(1).input_ids_BS
    for training in (True, False):
        hidden = []
        for graph in (with_losses, without):
            graph.model.train(training)
            hidden.append(graph.model(ids_BS))
        assert torch.equal(*hidden)
        gradients = []
        for graph, h_TD in zip((with_losses, without), hidden, strict=True):
            h_TD.sum().backward()
            gradients.append(dict(graph.routers())[1].weight_ED.grad.clone())
            graph.optimizer.clear_gradients()
        assert torch.equal(*gradients) is not training
        for _, router in with_losses.routers():
            assert set(router.losses()) == (set(KINDS[kind]) if training else set())
            router.balance.clear()
        assert all(router.losses() == {} for _, router in without.routers())


@pytest.mark.parametrize(
    ("kind", "losses"),
    [("sigmoid", {"sequence_balance_loss": 0.5}), ("softmax", {"balance_loss": 0.3}), ("softmax", {"z_loss": 0.05})],
)
def test_each_loss_falls_and_the_load_follows(kind, losses):
    """30 steps of a model whose routers start one-sided, without a moving selection bias, beside the same without."""
    ((name, coefficient),) = losses.items()
    floor = {"balance_loss": TOP_K, "sequence_balance_loss": 1.0, "z_loss": 0.0}[name]
    still = {"bias_update_rate": 0.0} if kind == "sigmoid" else {}
    # A coefficient that adds nothing keeps the figure in the books.
    asked, unasked = (figures(graph_of(kind, {name: c, **still}), name) for c in (coefficient, 1e-30))
    assert asked[0] == unasked[0]
    assert asked[-1][0] - floor < 0.2 * (unasked[-1][0] - floor)
    assert asked[-1][0] - floor < 0.5 * (asked[0][0] - floor)
    if name != "z_loss":
        assert asked[-1][1] < 0.6 * unasked[-1][1]


def figures(graph, name, steps=30):
    """(the loss, the largest load over the mean), both the mean over layers, of every step."""
    for _, router in graph.routers():
        router.weight_ED.data *= 20
        router.weight_ED.data[:2] *= 2
    found = []
    for step in range(1, steps + 1):
        seen = step * graph.tokens_per_step
        run_step(graph, graph.loader.batch(step), step=step, tokens_seen=seen, observe=lambda step, phase: None)
        layers = [(router.losses()[name], router.load_E.max() / router.load_E.double().mean())
                  for _, router in graph.routers()]  # fmt: skip
        found.append(tuple(float(sum(column)) / len(layers) for column in zip(*layers, strict=True)))
        for _, router in graph.routers():
            router.end_step(seen)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_with_losses_goes_on_exactly_and_reports_each_layer(kind, runs, tmp_path):
    """Nothing of the losses is state: what a step needs, it makes."""
    config = tmp_path / "config.toml"
    config.write_text(text_of(kind, KINDS[kind]))
    runs.config = config

    class Killed(BaseException):
        pass

    def observe(step, phase):
        if (step, phase) == (4, "optimizer"):
            raise Killed

    runs.train("straight", "output.stop_after_step=4", "output.checkpoint_every=9")
    sets = ("output.stop_after_step=4", "output.checkpoint_every=2")
    with pytest.raises(Killed):
        runs.train("killed", *sets, observe=observe)
    runs.train("killed", *sets)
    difference, _, _ = compare(runs.directory, "straight", "killed", 4)
    assert difference == ""
    for name in KINDS[kind]:
        straight, killed = (
            {(row.step, row.layer): row.value for row in read_rows(runs.metrics / run, names=[f"router/{name}"])}
            for run in ("straight", "killed")
        )
        assert set(straight) == {(step, layer) for step in range(1, 5) for layer in (1, 2, 3)}
        assert straight == killed

"""The whole model: the registry's names, repeatable bits, float32 gradients, bfloat16 close to float32."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nmoe.model import attention, rope
from nmoe.model.loss import linear_cross_entropy
from nmoe.rdep.local import LocalTransport


def batch(batch=2, length=40, vocab=64):
    ids = torch.randint(0, vocab, (batch, length + 1), generator=torch.Generator().manual_seed(7))
    return ids[:, :-1], ids[:, 1:].reshape(-1)


def step(model):
    ids, targets = batch()
    loss = linear_cross_entropy(model(ids), model.head.weight_VD, targets, chunk_tokens=32)
    (loss / targets.numel()).backward()
    return loss.detach()


def digest(model, loss):
    """SHA-256 of the loss and every gradient."""
    state = hashlib.sha256(loss.numpy().tobytes())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        state.update(parameter.grad.contiguous().numpy().tobytes())
    return state.hexdigest()


def test_parameters_are_the_registry_s(any_spec):
    with torch.device("meta"):
        model = any_spec.build(transport=LocalTransport())
    found = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert found == [(p.name, p.shape) for p in any_spec.parameters()]
    assert all(p.device.type == "meta" for p in model.parameters())


def test_every_parameter_gets_a_float32_gradient(any_spec, build_model):
    model = build_model(any_spec)
    step(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all()), name
        assert parameter.dtype == (torch.bfloat16 if any_spec.dtype == "bf16" else torch.float32)
        if ".experts." not in name:  # an expert may have got no token
            assert bool(parameter.grad.count_nonzero()), name


def test_gradients_of_microbatches_add_in_order(any_spec, build_model):
    model = build_model(any_spec)
    step(model)
    first = [p.grad.clone() for p in model.parameters()]
    step(model)
    for parameter, gradient in zip(model.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, gradient + gradient)


def test_two_runs_in_one_process_give_the_same_bits(any_spec, build_model):
    digests = []
    for _ in range(2):
        model = build_model(any_spec)
        digests.append(digest(model, step(model)))
    assert digests[0] == digests[1]


PROGRAM = """
import importlib.util, sys, torch
torch.set_num_threads(2)
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
folder, names = sys.argv[1], sys.argv[2:]
models, test = load("models", folder + "/conftest.py"), load("test", folder + "/test_transformer.py")
junk = [torch.randn(33333 + n) for n in range(50)]
for name in names:
    model = models.build(models.SPECS[name])
    print(name, test.digest(model, test.step(model)))
"""


def test_a_fresh_process_gives_the_same_bits(specs, build_model):
    """On two threads, and with other memory in use before, so that tensors lie elsewhere."""
    names = ["mla, compressed queries, windows"]
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *names],
        cwd=folder.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(2)
    models = [(name, build_model(specs[name])) for name in names]
    assert done.stdout == "".join(f"{name} {digest(model, step(model))}\n" for name, model in models)


def test_a_later_token_changes_nothing_before_it(any_spec, build_model):
    """Rows of a product may round otherwise at another place, so alike routing is asked for, and close values."""
    model = build_model(any_spec).eval()
    ids, _ = batch()
    with torch.no_grad():
        before = model(ids).view(2, 40, -1)
        changed = ids.clone()
        changed[:, 30:] = (changed[:, 30:] + 1) % 64
        after = model(changed).view(2, 40, -1)
    tolerance = 5e-2 if any_spec.dtype == "bf16" else 1e-5
    assert (before[:, :30] - after[:, :30]).abs().max() < tolerance
    assert (before[:, 30:] - after[:, 30:]).abs().max() > 0.5


def test_local_layers_alone_reach_as_far_as_their_windows(specs, build_model):
    """Two layers of window 7 see 12 tokens back; the global layer between them is made local for it."""
    model = build_model(specs["mla, compressed queries, windows"]).eval()
    assert [layer.attention.window for layer in model.layers] == [7, None, 7, None]
    model.layers[1].attention.window = 7
    del model.layers[2:]
    ids, _ = batch()
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 64
    with torch.no_grad():
        moved = (model(ids) - model(changed)).view(2, 40, -1).abs().amax(dim=2)
    assert bool((moved[:, :10] < 1e-5).all()) and bool((moved[:, 23:] < 1e-5).all())
    assert bool((moved[:, 10] > 1e-3).all()) and bool((moved[:, 11:23] > 1e-5).any())


def test_bfloat16_is_near_the_same_model_in_float32(make_spec, build_model, specs):
    """Same weights, rounded: the loss moves by less than a hundredth of its distance to a blind guess."""
    low = build_model(specs["bf16"])
    high = build_model(specs["bf16"]).float()
    loss_low, loss_high = step(low).item() / 80, step(high).item() / 80
    assert 0 < abs(loss_low - loss_high) < 5e-3
    for (name, a), b in zip(low.named_parameters(), high.parameters(), strict=True):
        if ".experts." in name or ".router." in name:  # a token near a tie may go elsewhere
            continue
        assert torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.97, name


def test_an_evaluation_in_inference_mode_leaves_training_as_it_was(specs, build_model):
    """What the first forward caches (rotary tables, masks) must serve later backwards."""
    model = build_model(specs["mla, compressed queries, windows"])
    expected = digest(model, step(model))
    rope.table.cache_clear()
    attention.mask.cache_clear()
    model = build_model(specs["mla, compressed queries, windows"])
    with torch.inference_mode():
        model.eval()(batch()[0])
    assert digest(model, step(model.train())) == expected


@pytest.mark.parametrize("train", [True, False])
def test_load_counts_once_a_forward(train, specs, build_model):
    model = build_model(specs["mla"]).train(train)
    model(batch()[0])
    loads = [int(layer.moe.router.load_E.sum()) for layer in model.layers if layer.moe is not None]
    assert loads == [80 * 2 * train] * 2

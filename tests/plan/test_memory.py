"""What the plan says of memory against tensors that are counted: by torch's hooks, and by what lives during a step."""

from pathlib import Path

import pytest
import torch

from nmoe import platform
from nmoe.bench.memory import Live, rows
from nmoe.errors import ConfigError
from nmoe.experts import grouped
from nmoe.graph import build, transport_sizes
from nmoe.kernels import launch
from nmoe.model import attention, loss
from nmoe.optim import muon, norm, rounding
from nmoe.plan import memory, rdep
from nmoe.plan.resolve import resolve, resolve_text
from nmoe.rdep.local import LocalTransport
from nmoe.registry import attention as specs
from nmoe.registry import moe
from nmoe.registry.experts import Bf16Experts
from nmoe.registry.moe import Moe
from nmoe.registry.router import SigmoidRouter

HERE = Path(__file__).parent
BASE = (HERE / "base.toml").read_text()
ROOT = HERE.parents[1]

QWEN = """kind = "gqa"
num_heads = 8
num_kv_heads = 2
head_dim = 16
qk_norm = true

[model.attention.local]
window = 24
global_every = 2
sinks = true

"""
SOFTMAX = """kind = "softmax"
num_experts = 8
top_k = 3

"""


def section(text: str, name: str, content: str) -> str:
    """The text with another content of one section; what is below `model.attention` goes with it."""
    start = text.index(f"[{name}]\n") + len(name) + 3
    following = "\n[model.mlp]" if name == "model.attention" else "\n["
    return text[:start] + content + text[text.index(following, start) + 1 :]


PLAIN = BASE[: BASE.index("[model.attention.rope_scaling]")]
DENSE = BASE[: BASE.index("[model.moe]")] + BASE[BASE.index("[optimizer]") :] + "\n["
for name in ("optimizer.router", "optimizer.experts", "output.router_collapse"):
    start = DENSE.index(f"[{name}]")
    DENSE = DENSE[:start] + DENSE[DENSE.index("\n[", start) + 1 :]
DENSE = DENSE.removesuffix("[")

WIDE = [
    "model.hidden_size=64", "model.vocab_size=512", "batch.sequence_length=128", "optimizer.matrices.ns_dtype='fp32'"
]  # fmt: skip
BF16 = [
    "model.dtype='bf16'", "model.moe.experts.kind='bf16'", "model.moe.experts.intermediate_size=16",
    "platform.threads=2",
]  # fmt: skip
TEXTS = {
    "mla, windows of gqa, groups": (BASE, WIDE),
    "one microbatch": (BASE, [*WIDE, "batch.microbatch=8"]),
    "bf16": (BASE, [*WIDE, *BF16, "batch.microbatch=8"]),
    "bf16 states": (BASE, [*WIDE, *BF16, "optimizer.state_dtype='bf16'", "batch.document_mask=true"]),
    "gqa, norms, sinks, softmax": (section(section(PLAIN, "model.attention", QWEN), "model.moe.router", SOFTMAX), WIDE),
    "tied": (BASE, [*WIDE, "model.tie_embeddings=true"]),
    "tied, one microbatch": (BASE, [*WIDE, "model.tie_embeddings=true", "batch.microbatch=8"]),
    "dense, documents": (DENSE, [*WIDE, "batch.document_mask=true"]),
}


def plan_of(name: str, recompute: str = "none"):
    text, sets = TEXTS[name]
    return resolve_text(text, "base.toml", [*sets, f"output.recompute='{recompute}'", "output.run_dir='unused'"])


@pytest.fixture(autouse=True)
def _switches_back():
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("recompute", ["none", "attention", "layer"])
@pytest.mark.parametrize("name", TEXTS)
def test_the_plan_is_what_a_step_takes(name, recompute):
    """Tensors exactly, what a forward keeps within 0.5%, the peak within 10%.

    A layout also keeps the counts of its segments, which the plan leaves out. The peak's error is in
    what a moment needs for itself, of which the plan has the large parts.
    """
    found = {row["kind"]: row for row in rows(plan_of(name, recompute))}
    for kind in ("weights", "gradients", "optimizer"):
        assert found[kind]["estimated"] == found[kind]["measured"]
    assert found["activations"]["ratio"] == pytest.approx(1, abs=0.005)
    assert found["peak"]["ratio"] == pytest.approx(1, abs=0.10)


@pytest.mark.parametrize("name", TEXTS)
def test_activations_are_what_autograd_saves(name, monkeypatch):
    """Storages that torch packs for backward, each once, without weights and ids; and the layouts of the routings."""
    layouts = []
    inner = LocalTransport.layout
    monkeypatch.setattr(LocalTransport, "layout", lambda *given: layouts.append(inner(*given)) or layouts[-1])
    plan = plan_of(name)
    graph = build(plan)
    batch = graph.loader.batch(1)
    ids_BS, documents_BS = (t[: graph.microbatch.sequences] for t in (batch.input_ids_BS, batch.document_ids_BS))
    theirs = [*graph.model.parameters(), *graph.model.buffers(), ids_BS, documents_BS]
    known = {t.untyped_storage().data_ptr() for t in theirs}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h_TD = graph.model(ids_BS, documents_BS if graph.document_mask else None)
    pack(h_TD)
    for places in layouts:
        for tensor in (places.owner_TK, places.row_TK, places.sent_TN, places.place_TN):
            pack(tensor)
    counted = sum(storage.nbytes() for storage in kept.values())
    assert plan.memory["none"].whole["activations"] == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("name", TEXTS)
def test_each_recompute_keeps_less(name):
    memory = plan_of(name).memory
    kept = [memory[recompute].whole["activations"] for recompute in ("none", "attention", "layer")]
    assert kept[0] > kept[1] > kept[2]
    assert memory["none"].whole["gradients"] == memory["layer"].whole["gradients"]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "gib"),
    [(32768, 128, 8, 768, 0.75), (32768, 128, 8, 512, 0.50), (32768, 64, 6, 1408, 1.04), (32768, 256, 7, 384, 0.33)],
)
def test_a_hopper_layer_keeps_what_was_measured(tokens, experts, top_k, width, gib):
    """The allocator's figures of kernels/NOTES.md ("kept, output left out"), two digits; their router kept little."""
    router = SigmoidRouter(num_experts=experts, top_k=top_k)
    spec = Moe(router=router, experts=Bf16Experts(intermediate_size=width))
    routing = spec.routing_bytes("sm_90a") - spec.router.saved_bytes("sm_90a")
    assert tokens * (spec.saved_bytes(2, "sm_90a") + routing) / 2**30 == pytest.approx(gib, abs=0.01)


def test_sizes_of_pieces_are_those_at_work():
    assert (memory.LOSS_CHUNK_TOKENS, memory.LOSS_CHUNK_BYTES) == (loss.CHUNK_TOKENS, launch.LOSS_BYTES)
    for vocab_size in (2, 257, 8192, 50304, 201088, 2**24):
        assert memory.gpu_loss_chunk(vocab_size) == launch.loss_chunk(vocab_size)
    assert memory.ROUNDING_BLOCK == rounding.BLOCK
    assert memory.MUON_PIECE == muon.PIECE
    assert memory.NORM_VALUES == norm.ROWS_AT_ONCE
    assert moe.CPU_CHUNK_ROWS == grouped.CHUNK_ROWS
    assert (specs.CPU_QUERIES, specs.CPU_HEADS) == (attention.BLOCK, attention.GROUP)
    size, count = platform.CUBLAS_WORKSPACE.removeprefix(":").split(":")
    assert int(size) * int(count) * 1024 == memory.CUBLAS_WORKSPACE


def test_the_peak_is_a_moment_of_the_step():
    """In the first microbatch gradients grow: with more parameters than activations the peak is late in backward."""
    one_microbatch = ["batch.sequences=8", "batch.microbatch=8"]
    large = resolve(ROOT / "configs" / "bench" / "super256.toml", one_microbatch)
    long = resolve(ROOT / "configs" / "quickstart.toml")
    assert large.memory["none"].moment == "backward of layer 0, ffn"
    assert long.memory["none"].moment in ("loss, forward", "backward of layer 1, ffn", "backward of layer 1, attention")
    for plan in (large, long):
        for one in plan.memory.values():
            assert one.at_peak["total"] == sum(v for k, v in one.at_peak.items() if k != "total")
            assert all(one.at_peak[kind] <= size for kind, size in one.whole.items())


def test_live_counts_each_storage_while_it_lives():
    with Live() as live:
        x = torch.zeros(1000)
        view = x[10:].view(-1)
        assert live.now == live.peak == 4000
        y = x + 1
        assert live.now == 8000
        del x
        assert live.now == 8000
        del view
        assert live.now == 4000
        y = y * 2
        assert (live.now, live.peak) == (4000, 8000)


@pytest.mark.parametrize("config", ["debug", "hopper"])
def test_the_ranks_buffers_are_their_regions(config):
    """Of the CPU's ranks and of GPUs, whose regions are made of other things."""
    plan = resolve(ROOT / f"configs/{config}.toml", [])
    sizes = transport_sizes(plan, 2)
    if config == "debug":
        regions = sizes.regions()
    else:
        regions = pytest.importorskip("nmoe.rdep.cuda").regions(sizes)
    wanted = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in regions.values())
    assert rdep.rdep_bytes(plan.config, 2) == wanted


def several_gpus(ranks: int, *sets: str):
    """The plan of a bench model for the GPUs of a node; its memory and its arena."""
    path = ROOT / "configs" / "bench" / "super256.toml"
    plan = resolve(path, ["batch.sequences=256", *sets], ranks=ranks, ranks_per_node=ranks)
    memory = plan.memory[plan.config.output.recompute]
    return plan, memory, memory.arena


@pytest.mark.parametrize(("ranks", "sets"), [(2, []), (8, []), (2, ["model.moe.router.num_experts=8"]),
                                             (8, ["eval.bpb={sequences=64, heldout='elsewhere'}"])])  # fmt: skip
def test_a_layers_most_rows_are_those_of_the_layout(ranks, sets):
    most_rows = pytest.importorskip("nmoe.kernels.layout_ranks").most_rows
    plan, memory, arena = several_gpus(ranks, *sets)
    sizes = transport_sizes(plan, ranks)
    most = most_rows(ranks=ranks, tokens=sizes.tokens, num_experts=sizes.num_experts, top_k=sizes.top_k)
    assert arena.layer == most
    assert arena.average == 12 * 16 * 2048 * 7
    assert arena.worst == 12 * most * 16 * 2048 // sizes.tokens
    assert arena.layer <= arena.rows <= arena.worst
    assert memory.whole["activation_arena"] == memory.at_peak["activation_arena"] == arena.rows * 2 * 384 * 2


def test_an_arena_takes_what_fits():
    """Up to the worst case, and no more than leaves the rest its room; one layer where each is computed again."""
    _, small, arena = several_gpus(2)
    assert arena.rows == arena.worst
    assert small.at_peak["total"] < rdep.DEVICE_BYTES["sm_90a"]
    _, memory, arena = several_gpus(8, "model.num_layers=24")
    assert arena.layer < arena.rows < arena.worst
    assert 0 <= rdep.DEVICE_BYTES["sm_90a"] - memory.at_peak["total"] < 2 * 384 * 2
    _, _, alone = several_gpus(8, "output.recompute='layer'")
    assert alone.rows == alone.layer
    _, given, arena = several_gpus(8, "output.activation_rows=2_000_000")
    assert arena.rows == 2_000_000
    assert given.at_peak["total"] == sum(v for k, v in given.at_peak.items() if k != "total")
    _, full, arena = several_gpus(8, "model.num_layers=96")
    assert arena.rows == arena.layer
    assert full.at_peak["total"] > rdep.DEVICE_BYTES["sm_90a"]


def test_one_rank_and_the_cpus_have_no_arena():
    assert several_gpus(1)[2] is None
    for ranks in (1, 4):
        plan = resolve(ROOT / "configs" / "debug.toml", ranks=ranks, ranks_per_node=ranks)
        assert plan.memory["none"].arena is None
        assert "activation_arena" not in plan.memory["none"].whole


@pytest.mark.parametrize(("ranks", "sets", "words"), [
    (8, ["output.activation_rows=1_835_007"], "activation_rows = 1835007 is too few for a layer of 8 GPUs, which can"),
    (8, ["batch.microbatch=8", "batch.sequence_length=2097152"], "more than the kernels' indices"),
])  # fmt: skip
def test_rows_that_no_layer_has_room_for_are_refused(ranks, sets, words):
    several_gpus(2, "output.activation_rows=1_835_007")
    with pytest.raises(ConfigError) as caught:
        several_gpus(ranks, *sets)
    (found,) = caught.value.diagnostics
    assert found.code == "N0119"
    assert words in found.message

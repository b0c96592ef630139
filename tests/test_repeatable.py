"""No operation of the list of unrepeatable ones stands in what a step is made of; the exceptions say why they are none.

The list is torch's own (`torch.use_deterministic_algorithms`: what raises, and what repeats only under it), with
Triton's atomics and every draw from a generator that is not named. torch's mode refuses at run time what it knows, on
the device that runs; this looks at the text, so at CUDA's part too where there is no GPU.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("kernels", "nmoe/data", "nmoe/eval", "nmoe/experts", "nmoe/graph.py", "nmoe/metrics", "nmoe/model",
          "nmoe/optim", "nmoe/rdep", "nmoe/rng.py", "nmoe/train")  # fmt: skip

UNORDERED = {
    "index_add", "scatter_add", "scatter_reduce", "index_reduce", "segment_reduce", "masked_scatter", "cumsum",
    "cumprod", "logcumsumexp", "kthvalue", "mode", "nanmedian", "histc", "histogram", "histogramdd", "embedding_bag",
    "grid_sample", "interpolate", "upsample", "fold", "ctc_loss", "nll_loss", "multi_margin_loss", "cdist",
    "max_unpool1d", "max_unpool2d", "max_unpool3d", "max_pool3d", "avg_pool3d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool2d", "fractional_max_pool2d", "fractional_max_pool3d", "pad_sequence",
    "atomic_add", "atomic_and", "atomic_cas", "atomic_max", "atomic_min", "atomic_or", "atomic_xchg", "atomic_xor",
}  # fmt: skip
"""Whatever they are given; each also with a `_` behind it."""

DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "poisson",
    "multinomial", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_",
    "log_normal_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    "orthogonal_", "dropout", "alpha_dropout", "gumbel_softmax", "rrelu", "scaled_dot_product_attention",
}  # fmt: skip
"""Unless their generator is named."""

GLOBAL = ("random.", "np.random.", "numpy.random.", "torch.random.", "torch.manual_seed", "torch.seed")
"""Generators of the process."""

INTEGERS = "adds whole numbers, which have one sum"
FLAGS = "a flag with one writer, which decides no value"
EXCEPTIONS = {
    ("kernels/layout.py", "cumsum"): INTEGERS,
    ("kernels/layout_ranks.py", "cumsum"): INTEGERS,
    ("nmoe/rdep/layout.py", "cumsum"): INTEGERS,
    ("nmoe/data/heldout.py", "cumsum"): INTEGERS,
    ("nmoe/data/loader.py", "cumsum"): INTEGERS,
    ("nmoe/data/prepare.py", "cumsum"): INTEGERS,
    ("nmoe/data/shards.py", "cumsum"): INTEGERS,
    ("kernels/signals.py", "atomic_xchg"): FLAGS,
    ("kernels/signals.py", "atomic_add"): FLAGS,
    ("kernels/moe.py", "index_add"): "the plain torch that a kernel is compared with; no step runs it",
    ("nmoe/rdep/layout.py", "embedding_bag"): "on the CPU, forwards, with sums: one thread owns a row",
}


def found(text: str) -> list[str]:
    """The unrepeatable operations that a file calls."""
    seen = []
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        whole = ast.unparse(call.func)
        name, given = whole.rpartition(".")[2], {word.arg for word in call.keywords}
        count = len(call.args) - _is_function(whole)
        if not isinstance(call.func, ast.Attribute):
            continue
        of_process = [one for one in GLOBAL if whole.startswith(one)]
        if of_process and "Generator" not in whole and "Philox" not in whole:
            seen += of_process
        elif name.removesuffix("_") in UNORDERED:
            seen.append(name.removesuffix("_"))
        elif name in DRAWS and "generator" not in given:
            seen.append(name)
        elif name in ("index_put", "index_put_", "put_") and (count > 2 or "accumulate" in given):
            seen.append("index_put, accumulating")
        elif name in ("scatter", "scatter_") and (count > 3 or "reduce" in given):
            seen.append("scatter, reducing")
        elif name == "bincount" and (count > 0 or "weights" in given):
            seen.append("bincount, weighted")
        elif whole in ("torch.sort", "torch.argsort") and "stable" not in given:
            seen.append("sort, unstable")
    return seen


def _is_function(whole: str) -> bool:
    return whole.partition(".")[0] in ("torch", "np")


def files():
    for place in PLACES:
        path = ROOT / place
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def test_nothing_unrepeatable_is_called():
    calls = Counter((str(path.relative_to(ROOT)), one) for path in files() for one in found(path.read_text()))
    assert set(calls) == set(EXCEPTIONS), "each call has its reason, and each reason its call"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x.index_add_(0, i, y)", ["index_add"]),
        ("torch.index_put(x, (i,), y, True)", ["index_put, accumulating"]),
        ("x.index_put_((i,), y, accumulate=True)", ["index_put, accumulating"]),
        ("x.index_put_((i,), y)", []),
        ("torch.index_put(x, (i,), y)", []),
        ("x.scatter_(0, i, y)", []),
        ("x.scatter_(0, i, y, reduce='add')", ["scatter, reducing"]),
        ("torch.bincount(x, w)", ["bincount, weighted"]),
        ("torch.bincount(x, minlength=3)", []),
        ("x.bincount(w)", ["bincount, weighted"]),
        ("x.cumsum(0)", ["cumsum"]),
        ("tl.atomic_add(p, 1)", ["atomic_add"]),
        ("torch.randn(3)", ["randn"]),
        ("torch.randn(3, generator=g)", []),
        ("x.uniform_()", ["uniform_"]),
        ("np.random.rand(3)", ["np.random."]),
        ("random.shuffle(x)", ["random."]),
        ("torch.manual_seed(0)", ["torch.manual_seed"]),
        ("torch.Generator().manual_seed(0)", []),
        ("torch.sort(x)", ["sort, unstable"]),
        ("torch.sort(x, stable=True)", []),
    ],
)
def test_the_look_sees_what_it_looks_for(text, what):
    assert found(text) == what

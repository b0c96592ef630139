"""The experts on the CPU beside a dense product of the same FLOPs.

`python -m nmoe.bench.experts --threads 2` times, for each shape, forward and backward of routed
experts (layout, gather, both products, SwiGLU, return; the gradients of x, of the router's weights
and of both matrices) and, call after call in the same process, the six products that a dense layer
of R = T K rows would need. Their ratio is what all the rest costs; it needs an idle machine and says
nothing about absolute speed. FLOPs: 6 R D F forward, 12 R D F backward. Each time is the least of
`--repeats` calls.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from nmoe.experts.fp32 import Fp32Experts
from nmoe.rdep.local import LocalTransport

SHAPES = {
    "quickstart": (2048, 64, 64, 16, 2),
    "small": (2048, 128, 128, 8, 2),
    "medium": (8192, 192, 192, 8, 2),
    "large": (8192, 512, 512, 8, 2),
}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, repeats: int) -> dict[str, float]:
    """GFLOP/s of forward and backward together, of the experts and of the dense products, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    module = Fp32Experts(num_experts=experts, hidden_size=hidden, intermediate_size=intermediate)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.05, generator=generator)
    x_TD = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    indices_TK = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    weights_TK = torch.rand(tokens, top_k, generator=generator).requires_grad_()
    dy_TD = torch.randn(tokens, hidden, generator=generator)
    transport = LocalTransport()

    def routed() -> None:
        places = transport.layout(indices_TK, experts, 0)
        module(x_TD, weights_TK, places, transport).backward(dy_TD)
        for tensor in (x_TD, weights_TK, *module.parameters()):
            tensor.grad = None

    rows = tokens * top_k
    x_RD = torch.randn(rows, hidden)
    pre_R2F, act_RF = torch.randn(rows, 2 * intermediate), torch.randn(rows, intermediate)
    gate_up_2FD, down_DF = torch.randn(2 * intermediate, hidden), torch.randn(hidden, intermediate)

    def dense() -> None:
        x_RD @ gate_up_2FD.t(), act_RF @ down_DF.t()
        x_RD @ down_DF, pre_R2F @ gate_up_2FD, x_RD.t() @ act_RF, pre_R2F.t() @ x_RD

    times = [(seconds(routed), seconds(dense)) for _ in range(repeats)]
    routed_seconds, dense_seconds = (min(column) for column in zip(*times, strict=True))
    flops = 18 * rows * hidden * intermediate
    return {
        "experts_gflops": flops / routed_seconds / 1e9,
        "dense_gflops": flops / dense_seconds / 1e9,
        "ratio": dense_seconds / routed_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="one JSON object a shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, shape in SHAPES.items():
        result = measure(*shape, repeats=arguments.repeats)
        if arguments.json:
            print(json.dumps({"shape": name, **dict(zip("TDFEK", shape, strict=True)), **result}))
        else:
            sizes = " ".join(f"{axis}{size}" for axis, size in zip("TDFEK", shape, strict=True))
            print(
                f"{name:12s} {sizes:26s} experts {result['experts_gflops']:6.1f} GFLOP/s, "
                f"dense {result['dense_gflops']:6.1f}, ratio {result['ratio']:.2f}"
            )


if __name__ == "__main__":
    main()

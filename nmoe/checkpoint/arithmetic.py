"""The arithmetic of this process by its bits: what a CPU, its libraries and their switches make of the same numbers.

Libraries choose their code by the CPU, the number of threads and variables, and a record of all that is a list of what
somebody has thought of. These results are what they come to: where one differs, bits of a training differ.
"""

import hashlib

import torch
from torch import Tensor

COUNT = 1 << 17
"""Elements: enough for every library to divide the work among threads."""


@torch.no_grad()
def results() -> dict[str, str]:
    """Name -> 16 hexadecimal digits of the SHA-256 of a result, on the CPU, always of the same inputs; 20 ms of a core.

    Products of matrices, sums, and the functions that a model, its loss and its optimizer use; odd sizes, so that
    the ends of vectors take part; and a number too small for a normal float32, which some switches make zero.
    """
    x_N = ((torch.arange(COUNT) * 7919) % 10007 - 5003).to(torch.float32) / 1250
    positive_N = x_N.abs() + 0.01
    a_MK, b_KN = x_N[: 211 * 307].view(211, 307), x_N[-307 * 193 :].view(307, 193)
    batch_BMK = x_N[: 12 * 67 * 97].view(12, 67, 97)
    found = {
        "product_fp32": a_MK @ b_KN,
        "product_bf16": a_MK.bfloat16() @ b_KN.bfloat16(),
        "products_fp32": batch_BMK @ batch_BMK.transpose(1, 2),
        "vector_fp32": a_MK @ b_KN[:, 5],
        "sum": x_N.sum(),
        "row_sums": x_N[: 401 * 317].view(401, 317).sum(-1),
        "column_sums": x_N[: 401 * 317].view(401, 317).sum(0),
        "softmax": x_N[: 401 * 317].view(401, 317).softmax(-1),
        "exp": x_N[:-3].exp(),
        "log": positive_N[:-3].log(),
        "sigmoid": x_N[:-3].sigmoid(),
        "silu": torch.nn.functional.silu(x_N[:-3]),
        "rsqrt": positive_N[:-3].rsqrt(),
        "sin": x_N[:-3].sin(),
        "cos": x_N[:-3].cos(),
        "denormal": torch.full((17,), 1e-39) * torch.full((17,), 0.5),
    }
    return {name: _digest(result) for name, result in found.items()}


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

"""The experts of one layer: as one function of autograd in plain torch, and as the module of every precision.

    y_t = sum over k of w_tk * W_down[e] swiglu(W_gate_up[e] x_t),   e = i_tk

The unit of arithmetic is the segment: an expert's rows of one microbatch (`nmoe.rdep.layout`). Every
product is called at the shape of its segment, so that its bits do not depend on the others. The rest
is done for a chunk of neighbouring segments at once, as many as have `CHUNK_ROWS` rows together:
small experts then cost a few calls each, and the rows of a chunk stay in the cache between its
products. The loop is over segments, never over tokens; each token's K rows are added in the order of k.

Rows are gathered through an index from what the transport received: x itself on one rank, the tokens
of every rank's microbatch on several. Backward keeps them, the pre-activations, the weights of the pairs
and the layout, nothing else. With G = dy gathered, unweighted, and A the activation:

    dA' = G W_down          dw = <dA', A>             d(pre) = swiglu'(w dA')
    dW_down = G^T (w A)     dW_gate_up = d(pre)^T X   dX = d(pre) W_gate_up

so no output row is stored for the router's gradient. Weight gradients are float32. Each microbatch's is
computed on its own and added to `grad` in the order of the microbatches: one rank that takes them in
passes, and many ranks that take them side by side, add the same numbers in the same order. Autograd can
only add what a whole pass returns, so backward adds to `grad` itself and returns no gradient for the
matrices. Where several nodes have the same experts, the microbatches before a node's are on other nodes: there
each one's gradient is kept by itself, for whoever adds them all (`Apart`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from nmoe.experts.product import into, product
from nmoe.experts.swiglu import swiglu, swiglu_backward
from nmoe.rdep.layout import Layout, combine
from nmoe.rdep.transport import AnyTransport, Places, Received, Transport

CHUNK_ROWS = 2048


class GroupedSwiglu(torch.autograd.Function):
    """`apply(x_TD, weights_TK, w_gate_up_L2FD, w_down_LDF, places, transport, apart)`.

    apart: where backward keeps the gradients of both matrices; None: it adds them to both `grad`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        w_gate_up_L2FD: Tensor,
        w_down_LDF: Tensor,
        places: Layout,
        transport: Transport,
        apart: "tuple[Apart, Apart] | None",
    ) -> Tensor:
        received = transport.dispatch(x_TD, weights_TK, places)
        x_UD, token_R = received.x_UD, received.token_R
        pre_R2F = x_UD.new_empty(token_R.numel(), 2 * w_gate_up_L2FD.shape[2])
        y_RD = x_UD.new_empty(token_R.numel(), x_UD.shape[1])
        gate_up_D2F = w_gate_up_L2FD.flatten(1, 2).transpose(1, 2).unbind()
        down_FD = w_down_LDF.transpose(1, 2).unbind()
        for chunk in chunks(places.segments_LN):
            pre = pre_R2F[chunk.rows]
            products(pre, x_UD.index_select(0, token_R[chunk.rows]), gate_up_D2F, chunk)
            products(y_RD[chunk.rows], swiglu(pre, chunk.segments), down_FD, chunk)
        ctx.save_for_backward(*attrs.astuple(received, recurse=False), w_gate_up_L2FD, w_down_LDF, pre_R2F)
        ctx.matrices = w_gate_up_L2FD, w_down_LDF
        ctx.places, ctx.transport, ctx.apart = places, transport, apart
        return combine(*transport.give_back(y_RD, received, places), weights_TK)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, w_gate_up_L2FD, w_down_LDF, pre_R2F = ctx.saved_tensors
        received, places, transport = Received(*tensors), ctx.places, ctx.transport
        x_UD, token_R, weight_R = received.x_UD, received.token_R, received.weight_R
        dy_UD = transport.dispatch_gradients(dy_TD, places)
        d_weight_R = torch.empty_like(weight_R)
        dx_RD = x_UD.new_empty(token_R.numel(), x_UD.shape[1])
        gate_up_2FD, down_DF = w_gate_up_L2FD.flatten(1, 2).unbind(), w_down_LDF.unbind()
        d_gate_up, d_down = ctx.apart or tuple(Gradient(matrix) for matrix in ctx.matrices)
        for chunk in chunks(places.segments_LN):
            x_RD, dy_RD = (rows_UD.index_select(0, token_R[chunk.rows]) for rows_UD in (x_UD, dy_UD))
            d_act_RF = torch.empty(len(dy_RD), w_down_LDF.shape[2], dtype=torch.float32, device=x_UD.device)
            products(d_act_RF, dy_RD, down_DF, chunk)
            act_RF, d_pre_R2F = swiglu_backward(
                pre_R2F[chunk.rows], d_act_RF, weight_R[chunk.rows], d_weight_R[chunk.rows], chunk.segments
            )
            d_down.add(dy_RD, act_RF, chunk)
            d_gate_up.add(d_pre_R2F, x_RD, chunk)
            products(dx_RD[chunk.rows], d_pre_R2F, gate_up_2FD, chunk)
        d_gate_up.store()
        d_down.store()
        rows, row_TK, d_weights_TK = transport.give_back_gradients(dx_RD, d_weight_R, received, places)
        return combine(rows, row_TK, None), d_weights_TK, None, None, None, None, None


@attrs.frozen(kw_only=True)
class Chunk:
    """Neighbouring segments: where their rows are, how many each has, and whose they are: (expert, microbatch)."""

    rows: slice
    segments: list[int]
    owners: list[tuple[int, int]]


def chunks(segments_LN: Tensor) -> Iterator[Chunk]:
    """Segments of at most CHUNK_ROWS rows together, or one. segments_LN: rows by expert and microbatch."""
    microbatches = segments_LN.shape[1]
    rows: list[int] = segments_LN.flatten().tolist()
    first = start = 0
    while first < len(rows):
        last, stop = first + 1, start + rows[first]
        while last < len(rows) and stop - start + rows[last] <= CHUNK_ROWS:
            stop += rows[last]
            last += 1
        owners = [divmod(segment, microbatches) for segment in range(first, last)]
        yield Chunk(rows=slice(start, stop), segments=rows[first:last], owners=owners)
        first, start = last, stop


def products(out_RN: Tensor, a_RK: Tensor, b_KN: Sequence[Tensor], chunk: Chunk) -> None:
    """out = a b_e for the rows of each segment; b_KN: a matrix for each expert."""
    for (expert, _), out, a in zip(chunk.owners, out_RN.split(chunk.segments), a_RK.split(chunk.segments), strict=True):
        into(out, a, b_KN[expert])


class Gradient:
    """One backward's additions to the float32 gradient of a matrix for each expert.

    The first one there ever is, microbatch 0's where `grad` is None, is taken as it is, also where the expert
    has no rows (0); the others are added in the order of their calls, microbatches rising.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.is_first = parameter, parameter.grad is None
        grad = parameter.grad
        self.grad = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device) if grad is None else grad
        self.grad_MN = self.grad.flatten(1, -2).unbind()

    def add(self, a_RM: Tensor, b_RN: Tensor, chunk: Chunk) -> None:
        """grad_e += a^T b over the rows of each segment."""
        pieces = zip(chunk.owners, a_RM.split(chunk.segments), b_RN.split(chunk.segments), strict=True)
        for (expert, microbatch), a, b in pieces:
            if self.is_first and microbatch == 0:
                into(self.grad_MN[expert], a.t(), b)
            elif len(a):
                self.grad_MN[expert].add_(product(a.t(), b, torch.float32))

    def store(self) -> None:
        """grad is whole: it becomes the parameter's."""
        self.parameter.grad = self.grad


class Apart:
    """The float32 gradients of a matrix for each expert, of every microbatch of a pass by itself.

    parts_M: (M, *shape of the parameter); each backward writes all of it. begins: whether microbatch 0 is the first
    of the step. A microbatch without rows for an expert has -0, which changes nothing that it is added to, -0
    included; the step's first has 0, as in `Gradient`.
    """

    def __init__(self, parameter: Tensor, microbatches: int) -> None:
        shape = (microbatches, *parameter.shape)
        self.parts_M = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        self.begins = False
        self.parts_MMN = [part.flatten(1, -2).unbind() for part in self.parts_M.unbind()]

    def add(self, a_RM: Tensor, b_RN: Tensor, chunk: Chunk) -> None:
        """part_e = a^T b over the rows of each segment."""
        pieces = zip(chunk.owners, a_RM.split(chunk.segments), b_RN.split(chunk.segments), strict=True)
        for (expert, microbatch), a, b in pieces:
            part_MN = self.parts_MMN[microbatch][expert]
            if len(a):
                into(part_MN, a.t(), b)
            else:
                part_MN.fill_(0.0 if self.begins and microbatch == 0 else -0.0)

    def store(self) -> None:
        """All parts are whole; who adds them knows where they are."""


class Bases(NamedTuple):
    """What the experts' sum begins with on a GPU: first + second + sum over k, (T, D) of x's dtype, None for nothing.

    ready: called before they are read, on the host; the stream then is one in which they are there.
    """

    first: Tensor | None = None
    second: Tensor | None = None
    ready: Callable[[], None] | None = None


NO_BASES = Bases()


class GroupedExperts(torch.nn.Module):
    """SwiGLU of the experts that one rank holds, on the rows that a layout gives each of them.

    num_experts: those held here, L. w_gate_up_E2FD: (L, 2, F, D), index 0 the gate, 1 up; w_down_EDF:
    (L, D, F); both empty until initialised. apart: see `keep_apart`.
    """

    def __init__(self, *, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w_gate_up_E2FD = torch.nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.w_down_EDF = torch.nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.apart: tuple[Apart, Apart] | None = None

    def keep_apart(self, microbatches: int) -> dict[str, Apart]:
        """From now on backward leaves `grad` alone: where it keeps each microbatch's gradients, by parameter."""
        self.apart = Apart(self.w_gate_up_E2FD, microbatches), Apart(self.w_down_EDF, microbatches)
        return dict(zip(("w_gate_up_E2FD", "w_down_EDF"), self.apart, strict=True))

    def forward(
        self, x_TD: Tensor, weights_TK: Tensor, places: Places, transport: AnyTransport, bases: Bases = NO_BASES
    ) -> Tensor:
        """y_t = sum over k of w_tk * expert_{i_tk}(x_t), i the routing that the transport's `layout` gave places for.

        x_TD: (T, D). weights_TK: (T, K) float32. Returns (T, D) in x's dtype. Differentiable in x, w and, on a GPU,
        the bases, which only it adds. The matrices' gradients are float32, and are added to `grad`, or kept apart, out
        of autograd's sight.
        """
        matrices = self.w_gate_up_E2FD, self.w_down_EDF
        if x_TD.device.type == "cpu":
            y_TD: Tensor = GroupedSwiglu.apply(x_TD, weights_TK, *matrices, places, transport, self.apart)
        else:
            from nmoe.experts.hopper import HopperSwiglu

            y_TD = HopperSwiglu.apply(x_TD, weights_TK, *matrices, places, transport, self.apart, *bases)
        return y_TD

"""The experts of one layer on a Hopper GPU: `nmoe.kernels.moe` as one function of autograd, for one rank or many.

The same mathematics as `nmoe.experts.grouped`, and the same saved tensors: x (on several ranks what this one
received), the pre-activations (on several ranks in the arena of all layers), the weights of the pairs and the layout.
bfloat16 rows and matrices; each microbatch's weight gradients float32, which backward adds to `grad` itself, in order,
or keeps apart, as `GroupedSwiglu` does; it returns no gradient for the matrices.

One rank gathers rows from x and sums its pairs' rows where the products left them; several send and fetch them in
between. The products and the sums are the same, at the same places, and so are the bits. Backward's rows travel while
dW_gate_up is computed, the largest product that they do not depend on and that needs nothing of the shared memory.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nmoe.kernels.arena import Kept
from nmoe.kernels.combine import combine
from nmoe.kernels.exchange import Received, received_layout
from nmoe.kernels.launch import RETURN_BESIDE_LAUNCH
from nmoe.kernels.layout import Layout
from nmoe.kernels.layout_ranks import Places
from nmoe.kernels.moe import (
    Saved,
    down_backward,
    experts_forward,
    fresh_gradients,
    gate_up_gradient,
    input_gradient,
    moe_backward,
    moe_forward,
    require,
)
from nmoe.rdep.transport import AnyTransport

if TYPE_CHECKING:
    from nmoe.experts.grouped import Apart
    from nmoe.rdep.cuda import CudaTransport


class HopperSwiglu(torch.autograd.Function):
    """`apply(x_TD, weights_TK, w_gate_up_L2FD, w_down_LDF, places, transport, apart, *bases)`, as `GroupedSwiglu`.

    bases: `nmoe.experts.grouped.Bases`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        w_gate_up_L2FD: Tensor,
        w_down_LDF: Tensor,
        places: Layout | Places,
        transport: AnyTransport,
        apart: "tuple[Apart, Apart] | None",
        first_TD: Tensor | None,
        second_TD: Tensor | None,
        ready: Callable[[], None] | None,
    ) -> Tensor:
        ctx.matrices = w_gate_up_L2FD, w_down_LDF
        ctx.places, ctx.transport, ctx.apart = places, transport, apart
        if isinstance(places, Layout):
            matrices = w_gate_up_L2FD, w_down_LDF
            y_TD, saved = moe_forward(x_TD, places, weights_TK, *matrices, base_TD=first_TD, more_TD=second_TD)
            ctx.save_for_backward(x_TD, weights_TK, *matrices, saved.h_2RF)
            return y_TD
        require(x_TD, weights_TK, w_gate_up_L2FD, w_down_LDF)
        several = cast("CudaTransport", transport)
        received = several.dispatch(x_TD, weights_TK, places)
        layout = received.layout
        kept = Kept(several.arena.h_2AF, places.first_row)
        y_RD = experts_forward(received.x_UD, layout, w_gate_up_L2FD, w_down_LDF, kept)
        rows_PD, slot_TK = several.give_back(y_RD, received, places)
        ctx.save_for_backward(
            *received[:3], w_gate_up_L2FD, w_down_LDF, layout.token_R, layout.pair_R, layout.row_TK
        )
        if ready is not None:
            ready()
        return combine(rows_PD, slot_TK, weights_TK, first_TD, second_TD)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        places, transport, dy_TD = ctx.places, ctx.transport, dy_TD.contiguous()
        gate_up, down = ctx.matrices
        if ctx.apart is not None:
            grads, continues = tuple(one.parts_M for one in ctx.apart), not ctx.apart[0].begins
        elif gate_up.grad is not None:
            grads, continues = (gate_up.grad, down.grad), True
        else:
            grads, continues = fresh_gradients(gate_up, down), False
        if isinstance(places, Layout):
            x_TD, weights_TK, w_gate_up_L2FD, w_down_LDF, h_2RF = ctx.saved_tensors
            saved = Saved(h_2RF, weights_TK, places)
            found = moe_backward(
                dy_TD, x_TD, w_gate_up_L2FD, w_down_LDF, saved, grads=grads, continues=continues
            )  # fmt: skip
            dx_TD, d_weights_TK = found.x_TD, found.weight_TK
        else:
            x_UD, weight_UK, token_U, w_gate_up_L2FD, w_down_LDF, *index = ctx.saved_tensors
            received = Received(x_UD, weight_UK, token_U, received_layout(places, *index))
            kept = Kept(transport.arena.h_2AF, places.first_row)
            dy_UD = transport.dispatch_gradients(dy_TD, places)
            layout = received.layout
            # The last that reads dy_UD, which peers may write as soon as the input gradients are there.
            dh_2RF, dot_NR = down_backward(dy_UD, weight_UK, kept, w_down_LDF, layout, grads[1], continues)
            dx_RD = input_gradient(dh_2RF, w_gate_up_L2FD, layout)
            rows_PD, slot_TK, d_weights_TK = transport.give_back_gradients(
                dx_RD, dot_NR, received, places,
                beside=lambda: gate_up_gradient(
                    x_UD, dh_2RF, layout, grads[0], continues, spared=RETURN_BESIDE_LAUNCH.blocks
                ),
            )  # fmt: skip
            dx_TD = combine(rows_PD, slot_TK, None)
        if ctx.apart is None:
            gate_up.grad, down.grad = grads
        bases = tuple(dy_TD if needed else None for needed in ctx.needs_input_grad[7:9])
        return dx_TD, d_weights_TK, None, None, None, None, None, *bases, None

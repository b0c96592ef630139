"""The MoE layer's parts must fit together."""

import pytest

from nmoe.errors import RunError
from nmoe.experts.fp32 import Fp32Experts
from nmoe.model.moe import MoE
from nmoe.model.router import SoftmaxRouter
from nmoe.rdep.local import LocalTransport


@pytest.mark.parametrize(("chosen", "held"), [(6, 4), (4, 6)])
def test_a_router_of_other_experts_than_the_ranks_hold_is_refused(chosen, held):
    router = SoftmaxRouter(hidden_size=8, num_experts=chosen, top_k=2, renormalize=True)
    experts = Fp32Experts(num_experts=held, hidden_size=8, intermediate_size=8)
    with pytest.raises(RunError, match=f"among {chosen} experts; ranks: 1, experts of each: {held}"):
        MoE(router=router, experts=experts, shared=None, transport=LocalTransport(), layer=2)

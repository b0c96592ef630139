"""Run by test_compiled.py: compile grouped products for sm_90 without a GPU and print what came out as JSON."""

import json

import torch

from nmoe.kernels import layout, products
from nmoe.kernels.arena import Kept
from nmoe.kernels.launch import launches
from tests.kernels.pretended import pretend, usage

found = {}
name = ""


def see(function, kernel):
    ptx = kernel.asm["ptx"]
    found[name] = {"wgmma": ptx.count("wgmma.mma_async"), "negations": ptx.count("neg.f32"), **usage(kernel)}


pretend(90, see)
T, D, F, E, K = 64, 512, 256, 4, 2
lay = layout.layout_reference(torch.zeros(T, K, dtype=torch.int32), E)
x_TD = torch.zeros(T, D, dtype=torch.bfloat16)
w_gate_up = torch.zeros(E, 2, F, D, dtype=torch.bfloat16)
table = launches(D)
h_2AF, rows_2RF = (torch.zeros(2, R, F, dtype=torch.bfloat16) for R in (1000, T * K))
w_down, weight_R = torch.zeros(E, D, F, dtype=torch.bfloat16), torch.zeros(T * K)
first_row = torch.zeros(1, dtype=torch.int32)
for end, kept in (("", Kept(rows_2RF, None)), (" in an arena", Kept(h_2AF, first_row))):
    name = "up" + end
    products.up_product(x_TD, w_gate_up, lay, kept, table["up"])
    for shape, p in (("", table["dgate"]), (" deep", launches(1024)["dgate"])):
        name = "dgate" + shape + end
        products.dgate_product(x_TD, w_down, kept, weight_R, lay, p)
name = "dw_up"
products.weight_gradient(x_TD, rows_2RF, lay, w_gate_up.float(), True, False, table["dw_up"])
name = "dw_up of segments"
segments = torch.zeros(2 * E + 1, dtype=torch.int32)
of_two = layout.OwnerLayout(*lay, segments, segments[:3])
products.weight_gradient(x_TD, rows_2RF, of_two, w_gate_up.float(), True, False, table["dw_up"])
name = "dw_up apart"
apart = torch.zeros(2, *w_gate_up.shape)
products.weight_gradient(x_TD, rows_2RF, of_two, apart, True, False, table["dw_up"])
print(json.dumps(found))

import sys, torch
from nmoe.bench import moe as B
from nmoe.kernels import moe
from nmoe.kernels.combine import gather_rows
from nmoe.kernels.layout import make_layout
s=B.SHAPES["qwen30b"]; x=B.make_inputs(s,"uniform"); lay=make_layout(x.expert_TK,s.E)
R=s.T*s.K
xr=gather_rows(x.x_TD,lay); w=x.weight_TK.view(-1)[lay.pair_R]
dh=torch.randn(2,R,s.F,device="cuda").bfloat16(); aw=dh[0].clone()
what,lab=sys.argv[1].split(":")
t=B.tables(lab)[lab]; p=t[what]
dn=torch.empty(x.w_down_EDF.shape,device="cuda")
gu=torch.empty(x.w_gate_up_E2FD.shape,device="cuda")
f={"up":lambda:moe.up_product(xr,x.w_gate_up_E2FD,lay,p),"dgate":lambda:moe.dgate_product(xr,x.w_down_EDF,dh,w,lay,p),
"dx":lambda:moe.dx_product(dh,x.w_gate_up_E2FD,lay,p),"down":lambda:moe.down_product(aw,x.w_down_EDF,lay,p),
"dw_down":lambda:moe.weight_gradient(xr,aw[None],lay,dn,False,True,p),"dw_up":lambda:moe.weight_gradient(xr,dh,lay,gu,False,False,p)}[what]
for _ in range(2): f()
torch.cuda.synchronize()

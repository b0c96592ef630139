"""The transformers library as a peer: its experts, and a whole training step of a stock model. Nothing if it is absent.

The step is what its users write: the model's own loss, backward for each microbatch, clip_grad_norm_, AdamW in torch's
fused kernel, gradients set to None. So that both do the same work it has the plan's tokens, microbatches, rates and
state dtypes; `difference` says what remains.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nmoe.data.loader import TokenBatch
from nmoe.export import library
from nmoe.export.config import config_json
from nmoe.optim.groups import DTYPES
from nmoe.plan.plan import Plan
from nmoe.registry.optimizer import AdamW

WAYS = ("eager", "grouped_mm")
"""How the library computes its experts: a loop, and torch's grouped_mm; its others want packages of their own."""


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def deepseek_experts(
    w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, top_k: int
) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """(way, module) of the library's DeepSeek-V3 experts with these weights; modules take x, indices, weights."""
    if not is_installed():
        return
    experts, _, F, D = w_gate_up_E2FD.shape
    with library.transformers() as transformers:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

        for way in WAYS:
            config = transformers.DeepseekV3Config(
                hidden_size=D, moe_intermediate_size=F, n_routed_experts=experts, num_experts_per_tok=top_k,
                hidden_act="silu",
            )  # fmt: skip
            config._experts_implementation = way
            with torch.device("meta"):
                module = DeepseekV3Experts(config)
            del module.gate_up_proj, module.down_proj  # given as tensors that take part in the caller's graph
            module.gate_up_proj, module.down_proj = w_gate_up_E2FD.view(experts, 2 * F, D), w_down_EDF
            yield way, module


class StockStep:
    """A training step of the plan's stock class. way: of `WAYS`. compile: the model through torch.compile.

    Its weights are drawn by the library, from a seed of its own.
    """

    def __init__(self, plan: Plan, way: str, *, device: torch.device, compile: bool) -> None:
        config = plan.config
        assert plan.stock_class.name is not None
        keys = config_json(
            config.model, plan.stock_class.name, context=config.batch.sequence_length, end_of_document=None
        )
        with library.transformers() as transformers, torch.random.fork_rng():
            torch.manual_seed(0)
            stock = transformers.AutoConfig.for_model(**keys)
            stock._attn_implementation = "sdpa"
            model = transformers.AutoModelForCausalLM.from_config(
                stock, dtype=DTYPES[config.model.dtype], experts_implementation=way
            )
        self.model = model.to(device).train()
        self.call: Callable[..., Any] = torch.compile(self.model, dynamic=False) if compile else self.model
        self.microbatch, self.clip_norm = config.batch.microbatch, config.optimizer.clip_norm
        self.share = 1.0 / config.batch.tokens_per_step
        self.weights = list(self.model.parameters())
        same = config.model.dtype == config.optimizer.state_dtype
        state = DTYPES[config.optimizer.state_dtype]
        self.masters = self.weights if same else [w.detach().to(state, copy=True) for w in self.weights]
        dense = config.optimizer.dense
        betas = (dense.beta1, dense.beta2) if isinstance(dense, AdamW) else (0.9, 0.95)
        self.optimizer = torch.optim.AdamW(self.masters, lr=dense.lr, betas=betas, fused=True)

    def run(self, batch: TokenBatch) -> float:
        """One step; the loss of its last microbatch, for which the host waits as ours does for the verdict."""
        loss = torch.zeros(())
        parts = (t.split(self.microbatch) for t in (batch.input_ids_BS, batch.targets_BS))
        for ids_BS, targets_BS in zip(*parts, strict=True):
            ids_BS, targets_BS = ids_BS.to(self.model.device), targets_BS.to(self.model.device)
            out = self.call(input_ids=ids_BS, labels=targets_BS, shift_labels=targets_BS, use_cache=False)
            loss = out.loss
            (loss * (targets_BS.numel() * self.share)).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
            for weight in self.weights:
                weight.grad = None
        return loss.item()


def difference(plan: Plan) -> str:
    """What a stock step does otherwise than ours, in words."""
    config = plan.config
    groups = config.optimizer.groups().values()
    said = ["weights of its own"]
    if any(not isinstance(group, AdamW) for group in groups):
        said.append("AdamW where the plan has Muon")
    if config.model.dtype != "fp32":
        said.append(f"gradients in {config.model.dtype}")
    if config.batch.document_mask:
        said.append("attends across documents")
    return "; ".join([*said, "whole logits; no biases moved"])

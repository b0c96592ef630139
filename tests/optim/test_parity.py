"""The optimizers' rules are torch's, setting by setting; `python -m tests.optim.parity` prints the figures."""

import attrs
import torch

from nmoe.registry.optimizer import AdamW, Muon
from tests.optim import parity


def test_adamw_is_torchs():
    rows = list(parity.adamw_rows())
    assert len(rows) == 12
    for row in rows:
        assert row.difference <= row.bound, row
        if "fused" in row.reference:
            # torch's kernel has an arithmetic of its own for the last elements of a tensor; these shapes have such.
            assert row.difference <= 1e-7, row


def test_muon_is_torchs():
    rows = list(parity.muon_rows())
    assert len(rows) == 3 * len(parity.MUON_SETTINGS)
    for row in rows:
        assert row.difference <= row.bound, row


def test_every_key_has_a_setting_of_its_own():
    """A key that no row changes could be ignored and the table would look the same."""
    for spec, settings in (
        (AdamW, [s for groups in parity.ADAMW_SETTINGS.values() for s in groups.values()]),
        (Muon, list(parity.MUON_SETTINGS.values())),
    ):
        for name in (field.name for field in attrs.fields(spec) if field.name != "ns_dtype"):  # both, in every setting
            assert len({getattr(s, name) for s in settings}) > 1, (spec, name)


def test_weights_are_the_masters_rounded():
    """bf16 weights with float32 state: the masters go on in float32, the weights are what is nearest to them."""
    specs = parity.ADAMW_SETTINGS["one group"] | {"matrices": parity.MUON_SETTINGS["defaults"]}
    first = {"dense": parity.start(parity.ADAMW_SHAPES, "dense"), "matrices": parity.start(parity.MUON_SHAPES, "m")}
    runs = [
        parity.train_ours(specs, first, steps=10, clip=1.0, scale=1e-2, weight_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for name, master in runs[0][1].items():
        assert torch.equal(master, runs[1][1][name])
    for group in runs[1][0]:
        for name, weight in group.parameters:
            assert torch.equal(weight.detach(), group.masters[name].bfloat16())
            assert not torch.equal(weight.detach().float(), group.masters[name])

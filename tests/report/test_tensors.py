"""Tensors of two checkpoints: in which order they are looked at."""

from nmoe.report.tensors import by_cause


def test_tensors_stand_in_the_order_in_which_a_step_makes_them():
    names = [
        "router.bias/layers.10", "master/norm.weight_D", "master/layers.10.a", "adamw.exp_avg/layers.2.a",
        "master/layers.2.a", "master/embedding.weight_VD", "router.bias/layers.2", "muon.momentum/layers.10.a",
    ]  # fmt: skip
    assert by_cause(names) == [
        "master/embedding.weight_VD", "adamw.exp_avg/layers.2.a", "master/layers.2.a", "muon.momentum/layers.10.a",
        "master/layers.10.a", "master/norm.weight_D", "router.bias/layers.2", "router.bias/layers.10",
    ]  # fmt: skip

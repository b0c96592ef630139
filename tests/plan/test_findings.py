"""What a finding says: the thing, the place, the way out; all of a file's at once, in its order."""

from pathlib import Path

import pytest

from nmoe.errors import ConfigError
from nmoe.plan.resolve import resolve_text

BASE = (Path(__file__).parent / "base.toml").read_text()


def findings(*changes):
    text = BASE
    for before, after in changes:
        assert before in text
        text = text.replace(before, after, 1)
    with pytest.raises(ConfigError) as caught:
        resolve_text(text, "configs/x.toml")
    return caught.value


def test_the_whole_of_one():
    error = findings(("[model.moe.experts]\n", "[model.moe.experts]\nintermediate = 16\n"))
    assert error.exit_code == 2
    assert error.render() == (
        "error[N0112]: unknown key `intermediate` in `model.moe.experts`\n"
        "  --> configs/x.toml:55\n"
        "   |\n"
        "55 | intermediate = 16\n"
        "   | ^^^^^^^^^^^^\n"
        "   = help: did you mean `intermediate_size`?\n"
        '   = note: keys of kind "fp32": intermediate_size (required)'
    )


def test_all_at_once_in_the_order_of_the_file():
    error = findings(
        ("threads = 1", "threads = 0"),
        ("num_layers = 4", 'num_layers = "4"'),
        ('kind = "mla"', 'kind = "mle"'),
        ("top_k = 2", "top_k = 9"),
        ("[schedule]", "[shedule]"),
        ("microbatch = 2", "microbatch = 3"),
    )
    # The schedule comes first because no line of the file is at fault for what is missing.
    assert [(d.code, d.line) for d in error.diagnostics] == [
        ("N0111", 0), ("N0115", 3), ("N0114", 12), ("N0113", 18), ("N0117", 45), ("N0112", 93), ("N0117", 109),
    ]  # fmt: skip


def test_a_check_that_needs_a_broken_part_is_not_made():
    """Two dense layers without [model.mlp] would be a finding, were it known how many layers there are."""
    error = findings(("num_layers = 4", "num_layers = 4.5"), ("[model.mlp]\nintermediate_size = 64\n", ""))
    assert [d.code for d in error.diagnostics] == ["N0114"]


@pytest.mark.parametrize(
    ("change", "way"),
    [
        (("num_layers = 4", "num_layer = 4"), "did you mean `num_layers`?"),
        (("num_layers = 4", "num_layers = 4\nlr = 1"), "`lr` is a key of [optimizer.dense], "),
        (("num_layers = 4", "num_layers = 4\nwindow = 1"), "`window` is a key of [model.attention.local]"),
        (("num_layers = 4", "num_layers = 4\nzzz = 1"), "remove it"),
        (("q_lora_rank = 24", "head_dim = 24"), '`head_dim` belongs to kind = "gqa"'),
        (("num_layers = 4", 'num_layers = "4"'), "remove the quotes: 4"),
        (("num_layers = 4", "num_layers = 4.0"), "write 4"),
        (("nesterov = true", 'nesterov = "True"'), "remove the quotes: true"),
        (("num_layers = 4", "num_layers = 0"), "the least that works: 1"),
        (('dtype = "fp32"', 'dtype = "FP32"'), 'did you mean "fp32"?'),
        (('dtype = "fp32"', "dtype = 32"), 'put quotes around it: "32"'),
        (('kind = "mla"', 'kind = "mlaa"'), 'did you mean "mla"?'),
        (('kind = "mla"', 'kind = "flash"'), 'one of: "mla", "gqa"'),
        (("sequences = 8", "sequences = 7"), "the nearest values that work: 6 or 8"),
        (("threads = 1\n", ""), "add `threads = 2` to [platform]"),
        (("nesterov = true", "nesterov = True"), "strings need quotes; the words true and false are lowercase"),
    ],
)
def test_the_way_out(change, way):
    assert any(d.help.startswith(way) for d in findings(change).diagnostics)


def test_messages_are_of_one_style():
    changes = [
        ("threads = 1", "threads = -1"), ("seed = 7", "sead = 7"), ("norm_eps = 1e-6", 'norm_eps = "x"'),
        ("top_k = 2", "top_k = 9"), ("head_dim = 8", "head_dim = 7"), ('name = "shakespeare"', 'name = "x"'),
    ]  # fmt: skip
    for diagnostic in findings(*changes).diagnostics:
        assert diagnostic.message[0].islower() or diagnostic.message[0] in "`[0123456789"
        assert not diagnostic.message.endswith(".")
        assert not diagnostic.help.endswith(".")
        assert "\n" not in diagnostic.help

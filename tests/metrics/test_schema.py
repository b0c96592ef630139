"""The closed list of names, and rows that fit it."""

import re

import pytest

from nmoe.errors import RunError
from nmoe.metrics import schema


def test_every_entry_is_well_formed():
    assert len(schema.METRICS) == len(schema.LIST), "a name is in the list twice"
    for metric in schema.LIST:
        group, _, rest = metric.name.partition("/")
        assert group in schema.GROUPS
        assert re.fullmatch(r"[a-z][a-z_]*", rest), metric.name
        assert metric.help and not metric.help.endswith("."), metric.name
        assert metric.unit or metric.text, metric.name
        assert set(metric.keys) <= set(schema.COLUMNS)
        assert not metric.text or "label" in metric.keys
    assert len(set(schema.GROUPS)) == 10


def test_a_name_that_is_not_in_the_list():
    with pytest.raises(RunError, match=r"N0401.*`train/los`(.|\n)*did you mean `train/loss`"):
        schema.lookup("train/los")
    with pytest.raises(RunError, match=r"N0401(.|\n)*joins the list"):
        schema.lookup("zzzzzz")


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("train/loss", {"layer": 1}, 1.0),
        ("train/loss", {}, None),
        ("router/entropy", {}, 1.0),
        ("router/entropy", {"layer": 1, "expert": 0}, 1.0),
        ("router/expert_load", {"layer": 1}, 1.0),
        ("grad/group_norm", {}, 1.0),
        ("data/batch_digest", {"label": "ff"}, 1.0),
        ("data/batch_digest", {}, None),
    ],
)
def test_a_row_with_other_columns_than_its_metric_needs(name, given, value):
    columns = dict.fromkeys(schema.COLUMNS) | given
    with pytest.raises(RunError, match=f"N0401.*{name}"):
        schema.check(schema.lookup(name), columns, value)


def test_zero_is_a_column_value_like_any_other():
    columns = dict.fromkeys(schema.COLUMNS) | {"layer": 0, "expert": 0}
    schema.check(schema.lookup("router/expert_load"), columns, 0.0)

"""A fast sample of every campaign; and the README's table is what the last whole one found."""

import re

import pytest

from nmoe.plan.resolve import resolve
from tests.torture.campaign import ROOT, SUBJECTS, read_results, run, subject, table


@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_is_lost_in_a_sample(name):
    found = [(batch.name, tally) for batch, tally, _ in run(subject(name).batches(sample=True))]
    assert found
    assert [(batch, one) for batch, tally in found for one in tally.lost] == []
    assert all(tally.tried for _, tally in found)


def test_every_plan_that_is_killed_can_be_launched():
    kills = subject("kills")  # here and not above: what it forks from has functions of nmoe replaced
    for name, (sets, others, _) in kills.ALL.items():
        for ranks in (1, *others):
            assert resolve(kills.config_of(name), sets, ranks=ranks, ranks_per_node=ranks), name


def test_the_readme_quotes_the_last_campaigns():
    readme = (ROOT / "README.md").read_text()
    (quoted,) = re.findall(r"<!-- torture -->\n(.*?)\n<!-- /torture -->", readme, flags=re.DOTALL)
    assert quoted == table(read_results())

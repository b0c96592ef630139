"""The root of the tree: one field for each top-level table, in the order of the plan."""

import attrs

from nmoe.registry.batch import Batch
from nmoe.registry.component import Component, section
from nmoe.registry.data import Data
from nmoe.registry.eval import Eval
from nmoe.registry.model import Model
from nmoe.registry.optimizer import Optimizer
from nmoe.registry.output import Output
from nmoe.registry.platform import Platform
from nmoe.registry.random import Random
from nmoe.registry.schedule import Wsd
from nmoe.registry.transport import Rdep


@attrs.frozen(kw_only=True)
class Config(Component):
    platform: Platform = section("the hardware", implied=True)
    random: Random = section("the seed", implied=True)
    model: Model = section("the transformer")
    transport: Rdep = section("how tokens reach their experts", implied=True)
    optimizer: Optimizer = section("how weights follow gradients")
    schedule: Wsd = section("how rates follow tokens")
    data: Data = section("what is read")
    batch: Batch = section("the step")
    eval: Eval = section("what is measured", implied=True)
    output: Output = section("where results go")

"""[random]: the one seed; every stream is named by it, a purpose and an index."""

import attrs

from nmoe.registry.component import Component, key


@attrs.frozen(kw_only=True)
class Random(Component):
    seed: int = key("seed of initialisation, data order and stochastic rounding", default=0, minimum=0)

"""[transport]: how a token's row reaches its experts and comes back."""

import attrs

from nmoe.registry.component import Component


@attrs.frozen(kw_only=True)
class Rdep(Component):
    """Direct dispatch and return: every pair has one place, computed from the counts by every rank."""

    def build(self):
        """The transport of one rank: the index points into x itself."""
        from nmoe.rdep.local import LocalTransport

        return LocalTransport()

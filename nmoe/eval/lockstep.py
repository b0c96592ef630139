"""Every rank makes the same number of calls.

A forward pass of a sharded model is a collective act: a rank that stops one batch early leaves the
others waiting for ever. So the number of calls is computed from the number of batches alone, the
same on every rank, and a rank with no batch left takes part with an empty one.
"""


def calls(num_batches: int, rank: int, world_size: int) -> list[int | None]:
    """The batch that `rank` scores at each call, in order; None is an empty batch.

    Rank r takes batches r, r + N, r + 2N, ...; every rank gets ceil(num_batches / N) calls.
    """
    rounds = -(-num_batches // world_size)
    return [index if (index := call * world_size + rank) < num_batches else None for call in range(rounds)]

"""What the kernels of target sm_90a take: another size is refused where the plan is made, not where it runs.

The widths are those of nmoe.kernels.launch, which a test compares; the counts are what their indices can hold.
"""

from collections.abc import Iterator

from nmoe.registry.component import Problem, divisible

QUERY_WIDTHS = (64, 96, 128, 192)
VALUE_WIDTHS = (64, 96, 128)
ROUTER_EXPERTS, ROUTER_CHOSEN = 256, 16
NORM_WIDTH = 16384
MOST_EXPERTS = 4096
MOST_CHOSEN = 64
INDICES = 2**31


def width_problems(config, path: str, width: int, widths: tuple[int, ...], whose: str) -> Iterator[Problem]:
    """A head of a width without an attention kernel."""
    if config.platform.target == "sm_90a" and width not in widths:
        yield Problem(
            path=path,
            message=f"{whose} is {width} wide, and sm_90a has no attention kernel for that",
            help=f"widths that work: {', '.join(map(str, widths))}",
        )


def head_problems(config, path: str, num_heads: int) -> Iterator[Problem]:
    """Statistics of a microbatch's queries, two for each query of each head, are counted in 32-bit integers."""
    blocks = -(-config.batch.sequence_length // 64)
    count = config.batch.microbatch * num_heads * blocks * 128
    if config.platform.target == "sm_90a" and count >= INDICES:
        yield Problem(
            path=path,
            message=f"num_heads = {num_heads} makes {count} statistics of a microbatch, more than 2^31 - 1",
            help="lower microbatch in [batch]",
        )


def norm_problems(config, path: str, width: int, name: str) -> Iterator[Problem]:
    """A norm over more elements than a program of the kernel holds."""
    if config.platform.target == "sm_90a" and width > NORM_WIDTH:
        yield Problem(
            path=path,
            message=f"{name} = {width} is more than sm_90a's norm takes",
            help=f"set {name} to at most {NORM_WIDTH}",
        )


def expert_problems(config, path: str, intermediate_size: int) -> Iterator[Problem]:
    """Rows are copied 16 bytes at a time; experts, choices and parts of rows are counted in 32-bit integers."""
    if config.platform.target != "sm_90a":
        return
    copied = "the elements of a 16-byte copy"
    yield from divisible(f"{path}.intermediate_size", intermediate_size, "intermediate_size", 8, copied)
    yield from divisible("model.hidden_size", config.model.hidden_size, "hidden_size", 8, copied)
    router = config.model.moe.router
    for name, value, most in (("num_experts", router.num_experts, MOST_EXPERTS), ("top_k", router.top_k, MOST_CHOSEN)):
        if value > most:
            yield Problem(
                path=f"model.moe.router.{name}",
                message=f"{name} = {value} is more than the kernels of sm_90a take",
                help=f"set {name} to at most {most}",
            )
    parts = max(2, -(-intermediate_size // 128))
    count = config.batch.microbatch * config.batch.sequence_length * router.top_k * parts
    if count >= INDICES:
        yield Problem(
            path="batch.microbatch",
            message=f"a microbatch makes {count} parts of experts' rows, more than 2^31 - 1",
            help="lower microbatch",
        )

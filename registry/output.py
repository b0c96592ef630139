"""[output]: where a run lies, how often it speaks, what it keeps, where it stops; it changes no bit of training."""

from collections.abc import Iterator
from math import floor
from posixpath import basename, dirname, join, normpath

import attrs

from nmoe.registry.component import Component, Problem, key, section


@attrs.frozen(kw_only=True)
class RouterCollapse(Component):
    """A router that has left most experts idle, or one with most of the work, for a window of steps."""

    dead_share: float | None = key(
        "share of a layer's experts without a token in a step, at which it counts; absent: it does not",
        default=None, above=0.0, maximum=1.0,
    )
    max_load: float | None = key(
        "a layer's largest load over the mean load in a step, at which it counts; absent: it does not",
        default=None, above=1.0, maximum=65536.0,
    )
    window: int = key(
        "consecutive steps of one attempt for which it has to hold", default=100, minimum=1, unit="steps"
    )
    action: str = key(
        "warn: say so and go on; stop: end the run with status 1, the last checkpoint stands",
        choices=("warn", "stop"),
    )

    def check(self, config, path: str) -> Iterator[Problem]:
        if config.model.moe is None:
            yield Problem(
                path=path, message=f"[{path}] watches routers, and the model has no MoE layer",
                help="remove the section, or add [model.moe]",
            )
            return
        if self.dead_share is None and self.max_load is None:
            yield Problem(
                path=path, message=f"[{path}] names no threshold", help="add dead_share, max_load or both",
            )
        experts, top_k = config.model.moe.router.num_experts, config.model.moe.router.top_k
        never = f"is never reached: a token uses {top_k} of {experts} experts, each once"
        if self.dead_share is not None and self.dead_share * experts > experts - top_k >= 0:
            yield Problem(
                path=f"{path}.dead_share", message=f"dead_share = {self.dead_share} {never}",
                help=self._most("dead_share", 1 - top_k / experts, 0.0),
            )
        if self.max_load is not None and self.max_load * top_k > experts >= top_k:
            yield Problem(
                path=f"{path}.max_load", message=f"max_load = {self.max_load} {never}",
                help=self._most("max_load", experts / top_k, 1.0),
            )
        steps = -(-config.schedule.total_tokens // config.batch.tokens_per_step)
        if self.window > steps:
            yield Problem(
                path=f"{path}.window",
                message=f"window = {self.window} is more than the run's {steps} steps",
                help=f"set window to at most {steps}",
            )

    @staticmethod
    def _most(name: str, most: float, above: float) -> str:
        rounded = floor(most * 10_000) / 10_000  # rounded to nearest it could be past what it names
        return f"set {name} to at most {rounded:g}" if rounded > above else f"remove {name}: all experts are used alike"

    def build(self):
        from nmoe.metrics.router_collapse import CollapseDetector

        return CollapseDetector(dead_share=self.dead_share, max_load=self.max_load, window=self.window)

RECOMPUTE = ("none", "attention", "layer")
MOST_ROWS = 2**30 - 2**15
"""Rows of an arena: those of its two planes are counted together in 32-bit integers."""


@attrs.frozen(kw_only=True)
class Output(Component):
    run_dir: str = key("directory of the run: config, plan, events, checkpoints")
    metrics_dir: str | None = key(
        "directory of all runs' metrics; absent: `metrics` beside the run directories", default=None
    )
    checkpoint_every: int = key(
        "steps between checkpoints; the last step is always saved", default=500, minimum=1, unit="steps"
    )
    keep_checkpoints: int = key("newest checkpoints kept", default=3, minimum=1)
    metrics_every: int = key(
        "steps between rows of metrics; the last step always has them", default=1, minimum=1, unit="steps"
    )
    progress_every: int = key(
        "steps between lines of progress where the output is no terminal", default=10, minimum=1, unit="steps"
    )
    prefetch: int = key("batches that are read ahead", default=2, minimum=0, maximum=1024)
    recompute: str = key(
        "what backward computes again instead of keeping it, with the same bits: each layer's attention, or its whole "
        "layer but the routing; it costs time and saves memory",
        default="none", choices=RECOMPUTE,
    )
    activation_rows: int | None = key(
        "rows of the arena in which all layers' experts keep a microbatch's pre-activations; only with several GPUs of "
        "a node; a step whose rows do not fit is repeated, with the same bits; absent: what fits",
        default=None, minimum=1, maximum=MOST_ROWS, unit="rows",
    )
    cuda_graph: bool = key(
        "a GPU's microbatches are recorded in the second step and replayed, so that its host limits no step; what runs "
        "beside them then needs memory of its own",
        default=True,
    )
    stop_after_step: int | None = key(
        "save and stop after this step, before the schedule's end", default=None, minimum=1
    )
    profile_steps: tuple[int, ...] | None = key(
        "steps of which each rank writes a trace into the run's directory, for Perfetto; absent: of none",
        default=None, minimum=1, unit="steps",
    )
    rank_timeout: float = key(
        "how long a rank waits for another at any point, before all of them end; only with several ranks",
        default=45.0, minimum=1.0, maximum=86400.0, unit="seconds",
    )
    divergence_every: int = key(
        "steps between comparisons of what all ranks hold alike, weights and router biases; one precedes every "
        "checkpoint; only with several ranks",
        default=100, minimum=1, unit="steps",
    )
    router_collapse: RouterCollapse | None = section("what is done about a router that has collapsed", optional=True)

    def check(self, config, path: str) -> Iterator[Problem]:
        for name, value in (("run_dir", self.run_dir), ("metrics_dir", self.metrics_dir)):
            if value is not None and value.startswith("~"):
                yield Problem(
                    path=f"{path}.{name}",
                    message=f'`{name}` = "{value}": nothing expands `~` here',
                    help="write the whole path, or one relative to where nmoe is started",
                )
        steps = -(-config.schedule.total_tokens // config.batch.tokens_per_step)
        if max(self.profile_steps or (0,)) > steps:
            yield Problem(
                path=f"{path}.profile_steps",
                message=f"profile_steps has step {max(self.profile_steps or (0,))}, and the run has {steps} steps",
                help=f"name steps of 1 to {steps}, such as [{min(10, steps)}]",
            )
        yield from self._arena_problems(config, f"{path}.activation_rows")
        run = normpath(self.run_dir)
        if basename(run) in ("", ".", ".."):
            yield Problem(
                path=f"{path}.run_dir",
                message=f"`run_dir` = \"{self.run_dir}\" has no last part that names the run",
                help='write one, as in run_dir = "runs/first"',
            )
        elif basename(run).startswith("."):
            yield Problem(
                path=f"{path}.run_dir",
                message=f"`run_dir` = \"{self.run_dir}\" names the run with a dot in front, which hides its metrics",
                help="drop the dot",
            )
        elif self.metrics_dir is None and run == join(dirname(run), "metrics"):
            yield Problem(
                path=f"{path}.run_dir",
                message=f"`run_dir` = \"{self.run_dir}\" is where the metrics of all runs lie",
                help="give the run another name, or set metrics_dir",
            )
        elif self.metrics_dir is not None and normpath(self.metrics_dir) == run:
            yield Problem(
                path=f"{path}.metrics_dir",
                message="`metrics_dir` is the run's own directory; metrics of all runs lie in it, by name",
                help="name another directory, or remove the key",
            )

    def _arena_problems(self, config, path: str) -> Iterator[Problem]:
        """An arena for nothing, or one that is too small for one layer of even two GPUs."""
        rows, moe = self.activation_rows, config.model.moe
        if rows is None:
            return
        useless = ""
        if config.platform.target == "cpu":
            useless = "has no meaning on target `cpu`, whose layers keep the rows that they have"
        elif moe is None:
            useless = "is for experts' rows, and the model has no MoE layer"
        elif self.recompute == "layer":
            useless = 'has no meaning with recompute = "layer", which keeps one layer\'s rows at a time'
        if useless:
            yield Problem(path=path, message=f"`activation_rows` {useless}", help="remove it")
            return
        sequences = config.batch.microbatch if config.eval.bpb is None else max(
            config.batch.microbatch, config.eval.bpb.sequences
        )
        least = 2 * sequences * config.batch.sequence_length * min(moe.router.top_k, moe.router.num_experts // 2)
        if rows < least:
            yield Problem(
                path=path,
                message=f"activation_rows = {rows} is too few for a layer of two GPUs, which can have {least} rows",
                help=f"set it to at least {least}, or remove it; nmoe build --ranks says what more GPUs need",
            )

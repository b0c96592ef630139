"""nmoe bench: how fast the parts of a training are here, beside the floor and beside what else is installed."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmoe.bench.rows import Row, to_json, to_table

if TYPE_CHECKING:
    from nmoe.plan.plan import Plan

EPILOG = "Exit status: 0 measured, 1 it failed, 2 CONFIG or an option is not valid."


@click.group("bench", epilog=EPILOG)
def command() -> None:
    """How fast the parts of a training are on this machine.

    Each subject gives ours, the peers that are installed, and the floor: the bytes that have to move at the rate of
    a copy, or the FLOPs at the rate of a dense product, whichever takes longer, both measured in the same run.

    \b
      nmoe bench moe --tokens 4096 --hidden 512 --width 256 --experts 16 --top-k 2
      nmoe bench step configs/bench/cpu_deepseek.toml --plot step.svg
      torchrun --standalone --nproc-per-node=2 -m nmoe bench rdep
    """


def shown(work: Callable[..., Iterable[Row]]) -> Callable[..., Any]:
    """A subject as a command: with the options that all have, its rows written as they ask."""

    def wrapped(*, as_json: bool, plot: Path | None, **given: Any) -> None:
        rows: list[Row] = []
        for row in work(**given):
            rows.append(row)
            if as_json:
                click.echo(to_json(row))
        if rows and not as_json:
            click.echo(to_table(rows))
        if rows and plot is not None:
            from nmoe.bench.picture import to_svg

            plot.write_text(to_svg(rows, f"nmoe bench {rows[0].work}"), encoding="utf-8")

    wrapped.__doc__ = work.__doc__
    wrapped = click.option(
        "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.svg", help="Draw the rows."
    )(wrapped)
    return click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")(wrapped)


def size(name: str, default: int | None, help: str) -> Callable[..., Any]:
    shows = "" if default is None else f"  [{default}]"
    return click.option(f"--{name}", type=click.IntRange(min=1), default=None, help=help + shows)


config_argument = click.argument("config", type=click.Path())
config_optional = click.argument("config", type=click.Path(), required=False)
sets_option = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of CONFIG; VALUE is TOML; repeatable."
)
repeats_option = click.option(
    "--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Calls of each."
)
compile_option = click.option("--compile", "compile", is_flag=True, help="Peers through torch.compile too.")


def resolved(config: str, sets: tuple[str, ...]) -> "Plan":
    from nmoe.plan.resolve import resolve

    return resolve(config, sets)


def if_given(config: str | None, sets: tuple[str, ...]) -> "Plan | None":
    if config is None and sets:
        raise click.UsageError("--set overrides a key of CONFIG, and there is no CONFIG")
    return None if config is None else resolved(config, sets)


def chosen(given: dict[str, int | None], of_plan: dict[str, int], defaults: dict[str, int]) -> dict[str, int]:
    """Sizes: an option's, else the plan's, else the default."""
    return {
        name: next(value for value in (given[name], of_plan.get(name), default) if value is not None)
        for name, default in defaults.items()
    }


def device_of(plan: "Plan | None") -> Any:
    from nmoe.bench.clock import device_for

    spec = None if plan is None else plan.config.platform
    return device_for(None, None) if spec is None else device_for(spec.target, spec.threads)


MOE = {"tokens": 4096, "hidden": 512, "width": 256, "experts": 16, "top_k": 2}


@command.command("moe", epilog=EPILOG)
@config_optional
@size("tokens", MOE["tokens"], "Tokens of a microbatch.")
@size("hidden", MOE["hidden"], "Hidden size.")
@size("width", MOE["width"], "An expert's intermediate size.")
@size("experts", MOE["experts"], "Experts.")
@size("top-k", MOE["top_k"], "Experts of a token.")
@click.option("--routing", type=click.Choice(["uniform", "zipf", "both"]), default="both", show_default=True)
@compile_option
@repeats_option
@sets_option
@shown
def moe(
    config: str | None, sets: tuple[str, ...], routing: str, compile: bool, repeats: int, **given: int | None
) -> Iterator[Row]:
    """The MoE layer, from router to output, forward and backward: of CONFIG's sizes, or of the options'."""
    plan, of_plan = if_given(config, sets), {}
    if plan is not None:
        model, batch = plan.config.model, plan.config.batch
        if model.moe is None:
            raise click.UsageError(f"{config} has no MoE layer")
        of_plan = {
            "tokens": batch.microbatch * batch.sequence_length, "hidden": model.hidden_size,
            "width": model.moe.experts.intermediate_size, "experts": model.moe.router.num_experts,
            "top_k": model.moe.router.top_k,
        }  # fmt: skip
    sizes = chosen(given, of_plan, MOE)
    if sizes["top_k"] > sizes["experts"]:
        raise click.UsageError(f"--top-k {sizes['top_k']} of {sizes['experts']} experts")
    device = device_of(plan)
    from nmoe.bench import moe_layer
    from nmoe.bench.moe import Shape

    shape = Shape(T=sizes["tokens"], D=sizes["hidden"], F=sizes["width"], E=sizes["experts"], K=sizes["top_k"])
    routings = moe_layer.ROUTINGS if routing == "both" else (routing,)
    yield from moe_layer.rows(shape, routings, device=device, repeats=repeats, compile=compile)


ATTENTION = {"batch": 4, "heads": 4, "groups": 4, "length": 512, "qk_dim": 64, "v_dim": 64}


@command.command("attention", epilog=EPILOG)
@config_optional
@size("batch", ATTENTION["batch"], "Sequences.")
@size("heads", ATTENTION["heads"], "Query heads.")
@size("groups", ATTENTION["groups"], "Key and value heads.")
@size("length", ATTENTION["length"], "Tokens of a sequence.")
@size("qk-dim", ATTENTION["qk_dim"], "Width of queries and keys.")
@size("v-dim", ATTENTION["v_dim"], "Width of values.")
@size("window", None, "Tokens that a query meets, itself included; all before it unless given.")
@compile_option
@repeats_option
@sets_option
@shown
def attention(
    config: str | None, sets: tuple[str, ...], window: int | None, compile: bool, repeats: int, **given: int | None
) -> Iterator[Row]:
    """Causal attention, forward and backward: of CONFIG's global layers, or of the options'."""
    plan, of_plan = if_given(config, sets), {}
    if plan is not None:
        from nmoe.registry.attention import Gqa, Mla

        spec, batch = plan.config.model.attention, plan.config.batch
        of_plan = {"batch": batch.microbatch, "heads": spec.num_heads, "length": batch.sequence_length}
        if isinstance(spec, Mla):
            of_plan |= {"groups": spec.num_heads, "qk_dim": spec.qk_nope_head_dim + spec.qk_rope_head_dim,
                        "v_dim": spec.v_head_dim}  # fmt: skip
        elif isinstance(spec, Gqa):
            of_plan |= {"groups": spec.num_kv_heads, "qk_dim": spec.head_dim, "v_dim": spec.head_dim}
    sizes = chosen(given, of_plan, ATTENTION)
    if sizes["heads"] % sizes["groups"]:
        raise click.UsageError(f"--heads {sizes['heads']} is no multiple of --groups {sizes['groups']}")
    device = device_of(plan)
    from nmoe.bench import attention_layer
    from nmoe.bench.attention import Shape

    B, H, G, S, Q, V = (sizes[name] for name in ATTENTION)
    yield from attention_layer.rows(
        Shape(B, H, G, S, Q, V, window), device=device, repeats=repeats, compile=compile
    )


@command.command("optimizer", epilog=EPILOG)
@config_argument
@repeats_option
@sets_option
@shown
def optimizer(config: str, sets: tuple[str, ...], repeats: int) -> Iterator[Row]:
    """Gradient norms, AdamW and Muon over CONFIG's parameters."""
    plan = resolved(config, sets)
    from nmoe.bench import optimizer

    yield from optimizer.rows(plan, repeats=repeats)


@command.command("step", epilog=EPILOG)
@config_argument
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="Steps after three to warm up.")
@click.option("--text", is_flag=True, help="Train on the packaged text, not on tokens drawn evenly.")
@click.option("--trace", type=click.Path(path_type=Path, file_okay=False), metavar="DIRECTORY",
              help="Write a profiled step of a GPU as CONFIG.json.gz, which Perfetto opens.")  # fmt: skip
@compile_option
@sets_option
@shown
def step(
    config: str, sets: tuple[str, ...], steps: int, text: bool, trace: Path | None, compile: bool
) -> Iterator[Row]:
    """CONFIG's whole training step, beside the transformers library's; under torchrun on several ranks."""
    plan = resolved(config, sets)
    from nmoe.bench import step
    from nmoe.bench.memory import with_data

    yield from step.rows(with_data(plan), steps=steps, text=text, trace=trace, compile=compile)


@command.command("repeatability", epilog=EPILOG)
@config_argument
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="Steps after three to warm up.")
@compile_option
@sets_option
@shown
def repeatability(config: str, sets: tuple[str, ...], steps: int, compile: bool) -> Iterator[Row]:
    """What CONFIG's step would save on a GPU if each part were the fastest here, whether its bits repeat or not."""
    plan = resolved(config, sets)
    if plan.config.platform.target == "cpu":
        raise click.UsageError(f"{config} is for CPUs; this subject has parts of a GPU's step alone")
    from nmoe.bench import repeatability
    from nmoe.bench.memory import with_data

    yield from repeatability.rows(with_data(plan), steps=steps, compile=compile)


@command.command("loader", epilog=EPILOG)
@config_argument
@repeats_option
@sets_option
@shown
def loader(config: str, sets: tuple[str, ...], repeats: int) -> Iterator[Row]:
    """CONFIG's batches, beside a copy of their tokens and beside what a step needs."""
    plan = resolved(config, sets)
    from nmoe.bench import loader

    yield from loader.rows(plan, repeats=repeats)


@command.command("checkpoint", epilog=EPILOG)
@config_optional
@click.option("--parameters", type=click.IntRange(min=1), metavar="P", help="Instead of CONFIG: a state of so many.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Steps of CONFIG to time.")
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Saves of each kind.")
@click.option("--threads", type=click.IntRange(min=1), default=4, show_default=True,
              help="That write, with half as many that hash; a run has 4.")  # fmt: skip
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="D",
              help="On the disk that is to be measured, not on the temporary one.")  # fmt: skip
@sets_option
@shown
def checkpoint(
    config: str | None, sets: tuple[str, ...], parameters: int | None, steps: int, repeats: int, threads: int,
    directory: Path | None,
) -> Iterator[Row]:  # fmt: skip
    """What a save of CONFIG's state holds up, how long it takes, and what hashing adds to it.

    \b
      held  ours             how long the steps are held up: the copy of the state
            a training step  beside it, the mean of several
      save  ours             from the call until HEAD names the checkpoint
            unhashed         the same, but objects are named without a look at their bytes
            one file         as many bytes written into one file and synced

    They take turns in one process, and each slice changes between two saves. Given are medians; hashing adds
    ours / unhashed - 1, the median over the turns.

    \b
      nmoe bench checkpoint configs/quickstart.toml --repeats 31 --directory runs
      nmoe bench checkpoint --parameters 100000000 --directory runs
    """
    if (config is None) == (parameters is None):
        raise click.UsageError("name either CONFIG or --parameters")
    plan = if_given(config, sets)
    from nmoe.bench import checkpoint
    from nmoe.bench.memory import with_data

    yield from checkpoint.rows(
        None if plan is None else with_data(plan), parameters=parameters or 0, steps=steps, repeats=repeats,
        threads=threads, directory=directory,
    )  # fmt: skip


@command.command("memory", epilog=EPILOG)
@config_argument
@sets_option
@shown
def memory(config: str, sets: tuple[str, ...]) -> Iterator[Row]:
    """What CONFIG's step takes in memory, kind by kind, beside what the plan says; under torchrun on several ranks."""
    from nmoe import platform
    from nmoe.plan.resolve import resolve

    process = platform.process()
    plan = resolve(config, sets, ranks=process.world_size, ranks_per_node=process.local_world_size)
    from nmoe.bench import memory

    yield from memory.bench_rows(memory.with_data(plan))


RDEP = {"tokens": 2048, "hidden": 256, "width": 256, "experts": 16, "top_k": 2}


@command.command("rdep", epilog=EPILOG)
@size("tokens", RDEP["tokens"], "Tokens of a rank.")
@size("hidden", RDEP["hidden"], "Hidden size.")
@size("width", RDEP["width"], "An expert's intermediate size.")
@size("experts", RDEP["experts"], "Experts, over all ranks.")
@size("top-k", RDEP["top_k"], "Experts of a token.")
@click.option("--vdev", is_flag=True, help="On GPUs: torch's all_to_all_vdev alone, which wants its own processes.")
@repeats_option
@shown
def rdep(repeats: int, vdev: bool, **given: int | None) -> Iterator[Row]:
    """Under torchrun: routed experts on several ranks, beside the same layer on each rank alone.

    On GPUs the sizes are fixed, and NCCL's exchanges of the same rows stand beside ours.
    """
    import torch

    if torch.cuda.is_available():
        if set(given.values()) != {None}:
            raise click.UsageError("on GPUs the sizes are fixed")
        from nmoe.bench import rdep_cuda

        yield from rdep_cuda.rows(repeats, vdev)
        return
    if vdev:
        raise click.UsageError("--vdev needs GPUs")
    from nmoe.bench import rdep

    yield from rdep.rows(**chosen(given, {}, RDEP), repeats=repeats)

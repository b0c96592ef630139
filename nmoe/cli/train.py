"""nmoe train: start a run, continue it, or say that it is complete."""

from pathlib import Path

import click


@click.command(
    "train",
    epilog="Exit status: 0 complete or stopped where [output] says, 1 the run failed, 2 the config is not valid "
    "or its plan does not run here, 130 stopped by a signal (saved; run again to continue).",
)
@click.argument("config", type=click.Path())
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key; VALUE is TOML; repeatable.")
@click.option("--new-lineage", is_flag=True, help="Go on in a changed environment, openly, as a new line of states.")
def command(config: str, sets: tuple[str, ...], new_lineage: bool) -> None:
    """Train what CONFIG says.

    On several CPU ranks it is started by torchrun, and gives the same bits:
    torchrun --standalone --nproc-per-node=2 -m nmoe train CONFIG.

    Starts the run or, when its directory holds one of the same fingerprint, continues it exactly
    where the last checkpoint stands. Run again after it is complete, it says so.

    \b
      nmoe train configs/quickstart.toml
      nmoe train configs/quickstart.toml --set output.run_dir='"runs/second"' --set random.seed=1
    """
    from nmoe import platform
    from nmoe.train.signals import StopRequest

    # Before anything that takes time, torch's import above all: a rank that a signal ended by itself would be missed.
    with StopRequest(at_once=platform.process().world_size == 1) as stop:
        from nmoe.plan.resolve import resolve

        plan = resolve(config, sets)

        from nmoe.train.loop import train

        text = Path(config).read_text(encoding="utf-8")
        outcome = train(plan, config_text=text, new_lineage=new_lineage, stop=stop)
        if outcome.summary:
            click.echo(outcome.summary)
        raise SystemExit(outcome.exit_code)

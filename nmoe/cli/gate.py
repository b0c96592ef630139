"""nmoe gate: prove that a killed run continues to the same bits."""

import json
from pathlib import Path

import click


def _steps(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter("takes steps separated by commas, for example 7,13,22", param_hint="--kill")
    return [int(part) for part in parts]


@click.command("gate", epilog="Exit status: 0 identical, 1 not identical or a run failed, 2 not valid.")
@click.argument("config", type=click.Path())
@click.option("--steps", type=int, required=True, metavar="N", help="Steps of both runs.")
@click.option("--kill", "kill", required=True, metavar="S1,S2,...", help="Steps that kill -9 interrupts.")
@click.option(
    "--ranks", type=click.IntRange(min=1), default=1, metavar="R",
    help="Ranks of the killed run, one of which is killed each time, and the others have to end by themselves; "
    "it is compared with a straight run on one.",
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key; VALUE is TOML; repeatable.")
@click.option(
    "--directory", type=click.Path(path_type=Path), help="Where both runs are kept; without it they are removed."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    config: str, steps: int, kill: str, ranks: int, sets: tuple[str, ...], directory: Path | None, as_json: bool
) -> None:
    """Train CONFIG twice, once straight through and once killed, and compare everything.

    Each attempt is a fresh process. Losses at full digits, batch digests, weights, masters, moments,
    router biases, loader, schedule and random streams have to be equal, bit for bit.

    \b
      nmoe gate configs/quickstart.toml --steps 30 --kill 7,13,22
      nmoe gate configs/debug.toml --steps 20 --kill 7,13 --ranks 4
    """
    import tempfile

    from nmoe.plan.resolve import resolve

    kills = _steps(kill)
    plan = resolve(config, sets)

    from nmoe.train.gate import GateResult, run_gate

    def say(text: str) -> None:
        click.echo(text, err=True)

    def gate(where: Path) -> GateResult:
        return run_gate(plan, config, sets, steps=steps, kills=kills, directory=where, say=say, ranks=ranks)

    if directory is None:
        with tempfile.TemporaryDirectory(prefix="nmoe-gate-") as temporary:
            result = gate(Path(temporary))
    else:
        result = gate(directory.resolve())

    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    elif result.identical:
        compared, who = result.compared, f" of one of {ranks} ranks" if ranks > 1 else ""
        click.echo(
            f"identical: {compared['steps']} steps, {len(result.kills)} kills{who}, {compared['tensors']} tensors, "
            f"state {result.state_digest}"
        )
    else:
        click.echo(f"not identical: {result.first_difference}")
    raise SystemExit(0 if result.identical else 1)

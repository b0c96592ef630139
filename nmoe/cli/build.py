"""nmoe build: resolve a config and show the plan. It starts nothing and never imports torch."""

import json
from pathlib import Path

import click


@click.command(
    "build",
    epilog="Exit status: 0 valid, 2 not valid. With --diff: 0 the fingerprints are equal, 1 they are not.",
)
@click.argument("config", type=click.Path(), required=False)
@click.option("--print", "as_text", is_flag=True, help="The plan for people (the default).")
@click.option("--json", "as_json", is_flag=True, help="The plan for programs.")
@click.option("--diff", "other", type=click.Path(), metavar="OTHER", help="What differs between CONFIG and OTHER.")
@click.option("--graph", "graph", type=click.Path(), metavar="FILE", help="Draw the model into FILE.svg or FILE.mmd.")
@click.option("--schema", "as_schema", is_flag=True, help="The JSON Schema of every config, for editors.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of CONFIG; VALUE is TOML.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, metavar="N", help="Size the plan for N ranks.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), default=1, metavar="M", help="... M of them on a node.")
def command(
    config: str | None,
    as_text: bool,
    as_json: bool,
    other: str | None,
    graph: str | None,
    as_schema: bool,
    sets: tuple[str, ...],
    ranks: int,
    ranks_per_node: int,
) -> None:
    """Show what CONFIG resolves to: every value, the fingerprint, the cost.

    \b
      nmoe build configs/moonlet.toml
      nmoe build configs/moonlet.toml --set model.num_layers=27 --json
      nmoe build configs/moonlet.toml --diff configs/moonlight.toml
      nmoe build configs/quickstart.toml --graph quickstart.svg
    """
    asked = [name for name, given in (
        ("--print", as_text), ("--json", as_json), ("--diff", other), ("--graph", graph), ("--schema", as_schema),
    ) if given]  # fmt: skip
    if len(asked) > 1:
        raise click.UsageError(f"{' and '.join(asked)} do not go together; ask for one of them.")
    if as_schema:
        if config is not None or sets:
            raise click.UsageError("--schema is that of every config: it takes no CONFIG and no --set.")
        from nmoe.plan.schema import schema

        click.echo(json.dumps(schema(), indent=2))
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG'; only --schema goes without one.")

    from nmoe.plan.resolve import resolve

    plan = resolve(config, sets, ranks=ranks, ranks_per_node=ranks_per_node)
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=2))
    elif other is not None:
        from nmoe.plan.diff import render_diff

        against = resolve(other, ranks=ranks, ranks_per_node=ranks_per_node)
        click.echo(render_diff(plan, against), nl=False)
        click.get_current_context().exit(0 if plan.fingerprint == against.fingerprint else 1)
    elif graph is not None:
        from nmoe.plan.graph_picture import draw

        draw(plan, Path(graph))
        click.echo(f"drew {graph}", err=True)
    else:
        from nmoe.plan.render import render

        click.echo(render(plan), nl=False)

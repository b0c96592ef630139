"""nmoe export: a run's model for programs that know nothing of nmoe."""

from pathlib import Path

import click

from nmoe.errors import ConfigError, Diagnostic


@click.command(
    "export",
    epilog="Exit status: 0 exported and compared, 1 it failed and nothing was left, 2 RUN, its plan or DIR is not "
    "valid, 130 interrupted.",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "layout", type=click.Choice(["hf"]), default="hf", show_default=True,
              help="hf: safetensors and config.json of a stock class of transformers.")  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Directory to write, new or empty.")  # fmt: skip
@click.option("--tokenizer", "tokenizer", type=click.Path(dir_okay=False), metavar="FILE",
              help="The tokenizer.json that the run's shards were prepared with.")  # fmt: skip
def command(run: Path, layout: str, output: Path, tokenizer: str | None) -> None:
    """Write the model of RUN's newest checkpoint in a stock layout.

    The checkpoint is verified to the last byte. The weights are those that training uses, in [model] dtype.
    What was written is loaded by the transformers library and its logits are compared with the run's own
    before DIR gets its name; what is called DIR is whole. `nmoe build CONFIG` says beforehand as which class a
    plan is exported, or why it cannot be.

    \b
      nmoe export runs/mine -o exported/mine
      python -P -c "from transformers import pipeline; print(pipeline('text-generation', 'exported/mine')('To be'))"
    """
    if not (run / "resolved.toml").is_file():
        raise ConfigError(
            Diagnostic(
                code="N0318",
                message=f"`{run}` is not a run's directory",
                help="name the directory that [output] run_dir says, such as runs/quickstart",
            )
        )
    from nmoe.export.hf import export

    def say(text: str) -> None:
        click.echo(text, err=True)

    done = export(run, output, tokenizer_path=tokenizer, say=say)
    figures = done.comparison
    click.echo(f"exported step {done.step} of {run} as {done.architecture} into {output}")
    click.echo(
        f"logits differ by at most {figures.difference:.1e} of the largest, on {figures.tokens} of "
        f"{figures.all_tokens} tokens; {figures.ties} of {figures.choices} choices of experts differ"
    )

"""[output]: where a run lies, how often it speaks, what it keeps, where it stops; it changes no bit of training."""

from collections.abc import Iterator
from posixpath import basename, dirname, join, normpath

import attrs

from nmoe.registry.component import Component, Problem, key


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
    stop_after_step: int | None = key(
        "save and stop after this step, before the schedule's end", default=None, minimum=1
    )

    def check(self, config, path: str) -> Iterator[Problem]:
        for name, value in (("run_dir", self.run_dir), ("metrics_dir", self.metrics_dir)):
            if value is not None and value.startswith("~"):
                yield Problem(
                    path=f"{path}.{name}",
                    message=f'`{name}` = "{value}": nothing expands `~` here',
                    help="write the whole path, or one relative to where nmoe is started",
                )
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

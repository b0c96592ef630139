"""[output]: where a run lies, how often it speaks, what it keeps, where it stops. None of it changes a bit of training."""

import attrs

from nmoe.registry.component import Component, key


@attrs.frozen(kw_only=True)
class Output(Component):
    run_dir: str = key("directory of the run: config, plan, events, checkpoints")
    metrics_dir: str | None = key("directory of all runs' metrics; absent: `metrics` beside the run directories", default=None)
    checkpoint_every: int = key("steps between checkpoints; the last step is always saved", default=500, minimum=1, unit="steps")
    keep_checkpoints: int = key("newest checkpoints kept", default=3, minimum=1)
    metrics_every: int = key("steps between rows of metrics; the last step always has them", default=1, minimum=1, unit="steps")
    progress_every: int = key("steps between lines of progress where the output is no terminal", default=10, minimum=1, unit="steps")
    prefetch: int = key("batches that are read ahead", default=2, minimum=0, maximum=1024)
    stop_after_step: int | None = key("save and stop after this step, before the schedule's end", default=None, minimum=1)

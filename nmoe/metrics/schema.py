"""Every metric that exists: its name, unit, meaning, and the columns that tell its rows apart.

The list is closed. A name that is not here is an error where it is added, as is a row that lacks a
column its metric needs or has one it does not, so that a reader of the ledger never has to guess.

A row's value is a float64; a text metric has its text in the label and no value.
"""

import difflib

import attrs

from nmoe.errors import fail

GROUPS = (
    "train", "grad", "optimizer", "throughput", "time", "memory", "router", "quant", "data", "eval",
)  # fmt: skip
"""What stands before the slash of a name."""

COLUMNS = ("layer", "expert", "rank", "label")
"""Columns that a metric may need."""


@attrs.frozen(kw_only=True)
class Metric:
    """One name of the ledger.

    unit: of the value; "1" for a ratio. keys: the columns of COLUMNS that each row has; the others are
    null. text: the value is null and the label is what was observed.
    """

    name: str
    unit: str
    help: str
    keys: tuple[str, ...] = ()
    text: bool = False


def _metric(name: str, unit: str, help: str, *keys: str) -> Metric:
    return Metric(name=name, unit=unit, help=help, keys=keys)


LIST = (
    _metric("train/loss", "nats/token", "mean cross-entropy over the step's tokens, before its update"),
    _metric("train/bits_per_byte", "bits/byte", "the same, over the bytes of text that the targets stand for"),
    _metric("grad/norm", "1", "2-norm of the whole gradient, before clipping"),
    _metric("grad/group_norm", "1", "2-norm of one optimizer group's gradient, before clipping", "label"),
    _metric("grad/clip", "1", "factor that clipping put on the gradient; 1 where it did nothing"),
    _metric("optimizer/scale", "1", "the schedule's factor s on every rate"),
    _metric("optimizer/rate", "1", "learning rate of one group", "label"),
    _metric("throughput/tokens_per_second", "tokens/s", "the step's tokens over its time"),
    _metric("throughput/smoothed", "tokens/s", "over the last 64 steps, stalls left out"),
    _metric("throughput/bytes_per_second", "bytes/s", "bytes of text that the targets stand for, over the step's time"),
    _metric("throughput/mfu", "1", "the step's FLOPs by the plan over its time, over the devices' named peak"),
    _metric("throughput/eta", "s", "time to the schedule's end at the smoothed rate, pauses included in their share"),
    _metric("time/step", "s", "from the batch being asked for to the weights being updated"),
    _metric("time/loader", "s", "waiting for the batch"),
    _metric("time/forward", "s", "forward passes and losses of all microbatches"),
    _metric("time/backward", "s", "backward passes of all microbatches"),
    _metric("time/norm", "s", "gradient norms and the finite check"),
    _metric("time/optimizer", "s", "optimizer step"),
    _metric("time/device", "s", "of the step before, a part that the label names, on rank 0's device", "label"),
    _metric("time/repeated", "s", "passes that were repeated, their experts' activations having had no room; else 0"),
    _metric("time/evaluation", "s", "one evaluation", "label"),
    _metric("time/checkpoint", "s", "host held up by the last checkpoint; a GPU's copy runs beside the next step"),
    _metric("memory/resident", "bytes", "resident memory of a rank's process", "rank"),
    _metric("memory/resident_peak", "bytes", "largest resident memory of a rank's process so far", "rank"),
    _metric("memory/device", "bytes", "device memory in use by a rank's tensors", "rank"),
    _metric("memory/device_peak", "bytes", "largest device memory in use by a rank's tensors so far", "rank"),
    _metric(
        "memory/activation_rows", "rows", "most rows of all layers' experts that a microbatch brought to a rank",
        "rank",
    ),
    _metric("router/entropy", "1", "entropy of the mean load over ln(experts): 1 is even, 0 is one expert", "layer"),
    _metric("router/load_cv", "1", "standard deviation of the experts' loads over their mean", "layer"),
    _metric("router/load_max", "1", "largest load over the mean", "layer"),
    _metric("router/load_min", "1", "smallest load over the mean", "layer"),
    _metric("router/dead_experts", "experts", "experts that no token chose in the step", "layer"),
    _metric("router/bias_min", "1", "smallest selection bias", "layer"),
    _metric("router/bias_max", "1", "largest selection bias", "layer"),
    _metric("router/bias_range", "1", "largest selection bias less the smallest", "layer"),
    _metric("router/balance_loss", "1", "balance loss, times no coefficient; experts for a token if even", "layer"),
    _metric("router/sequence_balance_loss", "1", "the one within sequences, times no coefficient; 1 if even", "layer"),
    _metric("router/z_loss", "nats^2", "mean squared log-partition of the logits, times no coefficient", "layer"),
    _metric("router/expert_load", "1", "load of one expert over the mean", "layer", "expert"),
    _metric("router/mean_entropy", "1", "mean of router/entropy over layers"),
    _metric("router/min_entropy", "1", "smallest router/entropy of any layer"),
    _metric("router/mean_load_cv", "1", "mean of router/load_cv over layers"),
    _metric("router/max_load", "1", "largest router/load_max of any layer"),
    _metric("router/min_load", "1", "smallest router/load_min of any layer"),
    _metric("router/total_dead_experts", "experts", "sum of router/dead_experts over layers"),
    _metric("router/max_bias_range", "1", "largest router/bias_range of any layer"),
    Metric(name="data/batch_digest", unit="", help="SHA-256 of the step's tokens", keys=("label",), text=True),
    _metric("data/tokens", "tokens", "tokens of the step"),
    _metric("data/bytes", "bytes", "bytes of text that the step's targets stand for"),
    _metric("eval/bits_per_byte", "bits/byte", "on the text that the label names, each byte scored once", "label"),
    _metric("eval/loss", "nats/token", "mean cross-entropy on the text that the label names", "label"),
    _metric("eval/tokens", "tokens", "tokens scored", "label"),
    _metric("eval/bytes", "bytes", "bytes of text that the scored tokens stand for", "label"),
)

METRICS = {metric.name: metric for metric in LIST}
"""The closed list, by name."""


def lookup(name: str) -> Metric:
    """The metric of that name; RunError N0401 for a name that the list does not have."""
    found = METRICS.get(name)
    if found is None:
        close = difflib.get_close_matches(name, METRICS, n=1)
        raise fail(
            "N0401",
            f"no metric is called `{name}`",
            place="nmoe/metrics/schema.py",
            help=f"did you mean `{close[0]}`?" if close else "a new name joins the list in nmoe/metrics/schema.py",
        )
    return found


def check(metric: Metric, given: dict[str, object], value: float | None) -> None:
    """RunError N0401 unless a row has exactly the columns that its metric needs.

    given: the columns of COLUMNS; None where a row has none.
    """
    wrong = [c for c in COLUMNS if (given[c] is not None) is not (c in metric.keys)]
    if wrong or (value is None) is not metric.text:
        needs = ", ".join(metric.keys) or "none of layer, expert, rank, label"
        has = ", ".join(c for c in COLUMNS if given[c] is not None) or "none of them"
        raise fail(
            "N0401",
            f"a row of `{metric.name}` needs {needs}{' and no value' if metric.text else ' and a value'}",
            place=f"has {has}, value {value}",
            help="give exactly the columns that the metric's entry in nmoe/metrics/schema.py lists",
        )

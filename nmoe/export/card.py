"""README.md of an export: what the model is, which state of which run, and how it was checked."""

from collections.abc import Sequence

import attrs

from nmoe.checkpoint.manifest import Manifest
from nmoe.export.compare import Comparison
from nmoe.plan.plan import Plan


@attrs.frozen(kw_only=True)
class Facts:
    """What the card says. bits_per_byte: of held-out text at this very step; None if it was not measured then."""

    architecture: str
    plan: Plan
    manifest: Manifest
    bits_per_byte: float | None
    has_tokenizer: bool
    comparison: Comparison
    library_version: str


def card(facts: Facts) -> str:
    """The file's content."""
    plan, manifest, model = facts.plan, facts.manifest, facts.plan.config.model
    tokens = manifest.step * plan.tokens_per_step
    bits = "not measured at this step" if facts.bits_per_byte is None else f"{facts.bits_per_byte:.4f}"
    rows = [
        ("run", f"`{manifest.identity.run}`"),
        ("plan's fingerprint", f"`{plan.fingerprint}`"),
        ("step", f"{manifest.step:,} of {plan.total_steps:,}"),
        ("tokens seen", f"{tokens:,}"),
        ("state digest", f"`{manifest.state_digest}`"),
        ("training data's digest", f"`{manifest.identity.data.get('train', '')}`"),
        ("held-out bits per byte", bits),
        ("parameters", f"{plan.parameters_total:,}, of which a token uses {plan.parameters_active:,}"),
        ("weights", f"{model.dtype}, from the run's masters as training uses them"),
    ]
    if model.moe is not None and model.moe.experts.precision != model.dtype:
        products = f"{model.moe.experts.precision} in training, {model.dtype} here"
        rows.append(("routed experts' products", products))
    check = facts.comparison
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- nmoe",
            "- mixture-of-experts",
            "---",
            "",
            f"# {manifest.identity.run}",
            "",
            f"A Mixture-of-Experts language model trained with nmoe, in the layout of `{facts.architecture}`.",
            "",
            *_table(("", ""), rows),
            "",
            "The fingerprint names everything that decided a bit of the training, the state digest every tensor of the",
            "state that was exported.",
            "",
            "## Checked",
            "",
            f"Loaded by transformers {facts.library_version} and compared with the run's own model, both in float32,",
            f"on {check.tokens:,} of {check.all_tokens:,} tokens: no logit differs by more than",
            f"{check.difference:.1e} of the largest; {check.ties:,} of {check.choices:,} choices of experts differ.",
            "",
            "## Use",
            "",
            *_usage(facts),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _usage(facts: Facts) -> list[str]:
    context = f"It was trained on {facts.plan.config.batch.sequence_length:,} tokens at a time."
    if not facts.has_tokenizer:
        return [f"There are no tokenizer files: ids are those of the run's tokenizer. {context}"]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")',
        'prompt = tokenizer.bos_token + "Once"',
        'ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))",
        "```",
        "",
        "In training every document begins with the token that ends the one before it, so a text from its beginning",
        f"starts with it. {context}",
    ]

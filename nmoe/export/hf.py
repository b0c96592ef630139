"""A run's HEAD as a directory that the transformers library loads.

The order is that of trust: the plan must have a stock class and the output directory be free before
anything is read; every byte of the checkpoint is verified before a tensor is made; what was written is
loaded back by the library and compared with the run's own model before it gets its name. Until then it is
called DIR.partial, so that what is called DIR is whole, whatever happens in between.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import torch
from torch import Tensor

from nmoe.checkpoint import disk, reader
from nmoe.checkpoint.manifest import Manifest
from nmoe.errors import ConfigError, Diagnostic, RunError, fail
from nmoe.export import compare, library, place, tokenizer, weights
from nmoe.export.card import Facts, card
from nmoe.export.config import config_json, generation_config_json
from nmoe.export.names import stock_tensors
from nmoe.metrics.reader import read_rows
from nmoe.model.router import Router
from nmoe.model.transformer import Transformer
from nmoe.plan.plan import Plan
from nmoe.plan.resolve import resolve
from nmoe.registry.config import Config
from nmoe.registry.experts import Fp32Experts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Say = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Exported:
    """What was written."""

    architecture: str
    step: int
    comparison: compare.Comparison


def export(run: Path, directory: Path, *, tokenizer_path: str | None = None, say: Say) -> Exported:
    """Writes the state that HEAD of `run` names into `directory`, which is new or empty.

    tokenizer_path: the tokenizer.json of a run on shards, which know its digest only. say takes lines of
    progress. ConfigError N0910, N0911, N0912, N0918; RunError N0303 for a damaged checkpoint, N0304 for none,
    N0913 to N0916, N0301 for a disk that fails.
    """
    plan = resolve(run / "resolved.toml")
    architecture = _stock_class(plan, run)
    library.require()
    place.require_free(directory)
    manifest = reader.require_head(run / "checkpoints")
    if manifest.identity.fingerprint != plan.fingerprint:
        raise fail(
            "N0914", "the run's resolved.toml is not the plan that its checkpoint was saved under", place=str(run),
            help="export it with the version of nmoe that trained it, or restore resolved.toml",
            notes=(f"checkpoint {manifest.identity.fingerprint}", f"plan       {plan.fingerprint}"),
        )  # fmt: skip
    text, end_of_document = tokenizer.of_run(plan.config, manifest.identity.data.get("train"), tokenizer_path, say)
    with place.partial(directory) as partial:
        say(f"reading step {manifest.step} of {run} (verified)")
        model = own_model(plan.config, run / "checkpoints", manifest)
        weights.write(partial, pieces(model, DTYPES[plan.config.model.dtype], architecture), say)
        context = plan.config.batch.sequence_length
        config = config_json(plan.config.model, architecture, context=context, end_of_document=end_of_document)
        weights.write_json(partial / "config.json", config)
        weights.write_json(partial / "generation_config.json", generation_config_json(end_of_document))
        files = {} if text is None else tokenizer.tokenizer_files(text, context=config["max_position_embeddings"])
        if text is not None and not files:
            say(f"no tokenizer files are written: a tokenizer of kind `{text.kind}` has no exact tokenizer.json")
        for name, content in files.items():
            disk.write_synced(partial / name, content)

        say("comparing what the library loads with the run's own model")
        ids_BS = compare.sample(plan.config.model.vocab_size, config["max_position_embeddings"])
        ours = compare.own_outputs(model, ids_BS)
        del model  # two float32 models at a time would be twice the memory
        with library.transformers() as transformers:
            theirs = compare.library_outputs(compare.load(transformers, partial, architecture), ids_BS)
        comparison = compare.compare(ours, theirs, sequences=len(ids_BS), place=str(directory))
        facts = Facts(
            architecture=architecture, plan=plan, manifest=manifest, bits_per_byte=_bits_per_byte(run, plan, manifest),
            has_tokenizer=bool(files), comparison=comparison,
            library_version=importlib.metadata.version("transformers"),
        )  # fmt: skip
        disk.write_synced(partial / "README.md", card(facts).encode())
    return Exported(architecture=architecture, step=manifest.step, comparison=comparison)


def _stock_class(plan: Plan, run: Path) -> str:
    """The name of the class; ConfigError N0910 with the reasons if there is none."""
    stock = plan.stock_class
    if stock.name is None:
        raise ConfigError(
            Diagnostic(
                code="N0910",
                message=f"no stock class computes this model; the nearest is {stock.nearest}",
                place=str(run),
                help="train a plan of which `nmoe build` says `export  as ...`",
                notes=stock.reasons,
            )
        )
    return stock.name


def own_model(config: Config, checkpoints: Path, manifest: Manifest) -> Transformer:
    """The run's model in evaluation, float32 on the CPU, its weights rounded to [model] dtype as training has them.

    Float32 holds every value of either dtype, so nothing is lost; it runs wherever the plan's target is.
    """
    spec, moe = config.model, config.model.moe
    if moe is not None:
        moe = attrs.evolve(moe, experts=Fp32Experts(intermediate_size=moe.experts.intermediate_size))
    model: Transformer = attrs.evolve(spec, dtype="fp32", moe=moe).build(transport=config.transport.build())
    dtype, master_dtype = DTYPES[spec.dtype], DTYPES[config.optimizer.state_dtype]
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                master = torch.empty(parameter.shape, dtype=master_dtype)
                reader.read_some(checkpoints, manifest, {f"master/{name}": master})
                parameter.copy_(master.to(dtype))
            for layer, bias_E in selection_biases(model).items():
                reader.read_some(checkpoints, manifest, {f"router.bias/{layer}": bias_E})
    except RunError as failure:
        raise _moved_on(checkpoints, manifest, failure) from failure
    return model


def selection_biases(model: Transformer) -> dict[str, Tensor]:
    """`layers.N` -> bias_E of each router that has one."""
    found = {name: module.bias_E for name, module in model.named_modules() if isinstance(module, Router)}
    return {name.removesuffix(".moe.router"): bias_E for name, bias_E in found.items() if bias_E is not None}


def _moved_on(checkpoints: Path, manifest: Manifest, failure: RunError) -> RunError:
    """The failure, or what explains it: where HEAD has moved on, older objects are cleared away."""
    if reader.head_step(checkpoints) == manifest.step:
        return failure
    return fail(
        "N0916", f"the run has gone on from step {manifest.step}, whose objects are being cleared away",
        place=str(checkpoints.parent), help="stop the run, or export again when it has less to do",
    )  # fmt: skip


def pieces(model: Transformer, dtype: torch.dtype, architecture: str) -> Iterator[weights.Piece]:
    """The stock tensors of `model`, in its order: in `dtype`, and selection biases in float32."""
    tensors = [(name, parameter.detach(), dtype) for name, parameter in model.named_parameters()]
    tensors += [(f"{layer}.moe.router.bias_E", b_E, torch.float32) for layer, b_E in selection_biases(model).items()]
    for name, tensor, stored in tensors:
        for stock, part in stock_tensors(architecture, name, tensor):
            yield weights.Piece(stock, part, stored)


def _bits_per_byte(run: Path, plan: Plan, manifest: Manifest) -> float | None:
    """The held-out figure of the exported step."""
    output = plan.config.output
    metrics = Path(output.metrics_dir) if output.metrics_dir else run.resolve().parent / "metrics"
    rows = read_rows(metrics / manifest.identity.run, names=["eval/bits_per_byte"])
    here = [row.value for row in rows if row.step == manifest.step and row.lineage == manifest.identity.lineage]
    return here[-1] if here else None

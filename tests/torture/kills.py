"""One rank is killed at a random instant, again and again, and the run goes on with another number of ranks.

Each batch is one config. A run is cut 2 to 4 times: SIGKILL to any of its ranks, after a drawn share of the processor
time, of the marks of phases or of the calls of the file system that the whole takes. The others end by themselves, and
another number of ranks continues from what stands. What the run leaves at its end, the state and every metric of
the training, is what the run of one rank leaves that nothing happened to.
"""

import json
import random
import signal
from functools import partial
from pathlib import Path

from nmoe.data import corpus
from nmoe.data.prepare import Request, prepare
from nmoe.data.tokenizer import BytesTokenizer
from tests.torture.blows import Trainings, apart
from tests.torture.campaign import Batch, Tally
from tests.train.launches import CONFIGS, DENSE, FOUR, FP32, SIX, TINY, first_difference

TITLE = "kill points x configs x ranks / bitwise identical"
STEPS = 10
KILLS = 15
SHORT_WAIT = "output.rank_timeout=15"  # a rank killed before they have met is waited for; torchrun would tell
SAMPLE = {"tiny: bf16 states, muon for matrices and experts, sigmoid": 2}

MIXTURE = "a mixture of three sources in two stages"
MORE = {
    MIXTURE: ((*FOUR, "output.prefetch=4"), (2, 4), ""),
    "grouped queries alone, all states fp32, no prefetch": (
        (*FOUR, *FP32, 'model.attention.kind="gqa"', "model.attention.num_kv_heads=1", "model.attention.head_dim=8",
         "model.attention.num_heads=4", "output.prefetch=0"), (2, 4), ""),
    "six sequences, untied, rows of metrics every 3 steps": (
        (*SIX, "model.moe.router.num_experts=6", "model.tie_embeddings=false", "output.metrics_every=3",
         "output.prefetch=16"), (2, 3, 6), ""),
}  # fmt: skip
ALL = {**CONFIGS, **MORE}


def batches(sample: bool) -> list[Batch]:
    wanted = SAMPLE if sample else dict.fromkeys(ALL, KILLS)
    return [Batch(name, partial(_cut, name, kills, sample)) for name, kills in wanted.items()]


def config_of(name: str) -> Path:
    return TINY.with_name("dense.toml") if name == DENSE else TINY


def _cut(name: str, kills: int, sample: bool, directory: Path) -> Tally:
    sets, others, odd = ALL[name]
    draws, counts = random.Random(f"kills: {name}"), (1, *others)
    keys = (*sets, f"output.stop_after_step={STEPS}", "eval.bpb.every_tokens=192", "eval.bpb.max_tokens=64")
    if name == MIXTURE:
        keys = (*keys, *_mixture(directory))
    runs = Trainings(directory, *keys, config=config_of(name), odd=odd)
    runs.straight("straight")
    wanted = runs.left("straight")
    lost, landed, number, landed_by = [], 0, 0, {}
    while landed < kills:
        number += 1
        run, before = f"killed {number}", landed
        cuts = min(draws.randint(2, 4), kills - landed)
        for _ in range(cuts):
            ranks = draws.choice(others if sample else counts)
            every = f"output.checkpoint_every={draws.randint(1, 4)}"
            blow = runs.draw(draws, run, ranks, STEPS, signal.SIGKILL)
            ended = runs.attempt(run, ranks, every, SHORT_WAIT, blow=blow)
            hit = ended.codes[blow.rank] == -signal.SIGKILL
            landed += hit
            if hit:
                key = f"on {ranks} rank" + ("s" if ranks > 1 else "")
                landed_by[key] = landed_by.get(key, 0) + 1
            rest = {code for rank, code in enumerate(ended.codes) if rank != blow.rank or not hit}
            if not rest <= ({0, 1} if hit else {0}):
                lost.append(f"{run}, {ranks} ranks, {blow}: {ended.codes}\n" + "\n".join(ended.said))
            if not hit:
                break
        ended = runs.attempt(run, draws.choice(counts), f"output.checkpoint_every={draws.randint(1, 4)}")
        if any(ended.codes):
            lost.append(f"{run}: could not go on: {ended.codes}\n" + "\n".join(ended.said))
            continue
        difference = first_difference(wanted, runs.left(run))
        if difference:
            lost += [f"{run}: {difference}"] * max(landed - before, 1)
    return Tally(tried=landed, lost=tuple(lost), notes={"configs": 1, "runs": number, **landed_by})


def _mixture(directory: Path) -> list[str]:
    """Keys of a mixture of three small sources, several epochs of them in a run."""
    text = corpus.documents("shakespeare", "train")[0]

    def prepared() -> list[str]:
        for place, size in enumerate((500, 900, 700, 400)):
            source = directory / f"{place}.txt"
            source.write_text(text[1000 * place : 1000 * place + size])
            request = Request(shard_tokens=8192)
            prepare([source], directory / f"source{place}", BytesTokenizer(), request, workers=1)
        return [str(directory / f"source{place}" / "train") for place in range(4)]

    *sources, held = apart(prepared, directory / "sources.json")
    stages = "[{until_tokens=256, weights=[2, 1, 0]}, {weights=[1, 3, 2]}]"
    return ['data.kind="mixture"', f"data.sources={json.dumps(sources)}", f"data.stages={stages}",
            f'eval.bpb.heldout="{held}"']  # fmt: skip

"""Keys outside the fingerprint cannot change a bit of training: each is changed, and ten steps compared.

Keys that say where to stop stand aside: they decide which state is the last one.
"""

import base64
import shutil
from pathlib import Path

import attrs
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nmoe.data import corpus
from nmoe.data.prepare import Request, prepare
from nmoe.data.tokenizer import BytesTokenizer
from nmoe.plan.structure import is_section
from nmoe.registry.table import OUTSIDE, TABLE

STEPS = 10
SMALL = (f"output.stop_after_step={STEPS}", "model.num_layers=2", "batch.sequences=2")
BASE = {
    "output.checkpoint_every": 5, "output.keep_checkpoints": 3, "output.metrics_every": 1, "output.progress_every": 10,
    "output.prefetch": 2, "output.recompute": '"none"', "eval.bpb.every_tokens": 128, "eval.bpb.max_tokens": 64,
    "eval.bpb.sequences": 4, "eval.bpb.context": 0, "output.rank_timeout": 45.0,
    "output.divergence_every": 100, "output.cuda_graph": "true",
    "output.router_collapse.dead_share": 0.75, "output.router_collapse.max_load": 4.0,
    "output.router_collapse.window": 2, "output.router_collapse.action": '"warn"', "output.profile_steps": "[2]",
}  # fmt: skip
CHANGED = {
    "output.checkpoint_every": 1, "output.keep_checkpoints": 1, "output.metrics_every": 3, "output.progress_every": 1,
    "output.prefetch": 0, "output.recompute": '"layer"', "eval.bpb.every_tokens": 32, "eval.bpb.max_tokens": 17,
    "eval.bpb.sequences": 3, "eval.bpb.context": 5, "output.rank_timeout": 5.0,
    "output.divergence_every": 1, "output.cuda_graph": "false",
    # Either of the two is found and said in these runs; a window longer than the run is never full.
    "output.router_collapse.dead_share": 0.125, "output.router_collapse.max_load": 1.25,
    "output.router_collapse.window": STEPS + 1, "output.router_collapse.action": '"stop"',
    "output.profile_steps": "[1, 4, 5, 10]",
}  # fmt: skip
PLACES = {"output.run_dir", "output.metrics_dir"}
PATHS = {
    "data.train", "data.sources", "eval.bpb.heldout",
    "data.tokenizer.path of huggingface", "data.tokenizer.path of tiktoken",
}  # fmt: skip
STOPS = {"output.stop_after_step"}
ON_GPUS = {"output.activation_rows"}  # refused on the CPU; tests/gpu/test_two_gpus.py changes it


def base(*names: str) -> list[str]:
    return [f"{key}={value}" for key, value in BASE.items() if key not in names]


@pytest.fixture(scope="module")
def expected(module_runs):
    """(state digest, losses) of the ten steps with the base values."""
    module_runs.train("base", *SMALL, *base())
    return module_runs.digest("base"), module_runs.losses("base")


def test_no_key_is_forgotten():
    """The keys that these tests change are those that the registry puts outside."""
    outside = set()
    for section, kinds in TABLE.items():
        for kind, spec in kinds.items():
            for field in attrs.fields(spec):
                if is_section(field) or not (section.split(".")[0] in OUTSIDE or field.metadata.get("outside")):
                    continue
                key = f"{section}.{field.name}"
                outside.add(f"{key} of {kind}" if section == "data.tokenizer" else key)
    assert outside == {*CHANGED, *PLACES, *PATHS, *STOPS, *ON_GPUS}


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_changes_no_bit(module_runs, expected, key):
    assert CHANGED[key] != BASE[key]
    name = key.replace(".", "-")
    module_runs.train(name, *SMALL, *base(key), f"{key}={CHANGED[key]}")
    assert module_runs.digest(name) == expected[0]
    assert set(module_runs.losses(name)) <= set(expected[1])


def test_attention_computed_again_changes_no_bit(module_runs, expected):
    """The third value of `output.recompute`."""
    module_runs.train("attention", *SMALL, *base("output.recompute"), 'output.recompute="attention"')
    assert module_runs.digest("attention") == expected[0]
    assert module_runs.losses("attention") == expected[1]


def test_a_run_goes_on_with_another_recompute(module_runs, expected):
    """Out of memory after step 5, say: the same run continues with less kept, to the same state."""
    half = [f"output.stop_after_step={STEPS // 2}", *SMALL[1:], *base()]
    module_runs.train("switched", *half)
    module_runs.train("switched", *SMALL, *base("output.recompute"), 'output.recompute="layer"')
    assert module_runs.digest("switched") == expected[0]
    assert module_runs.losses("switched") == expected[1]


def test_all_of_them_at_once_change_no_bit(module_runs, expected):
    """And neither do the directories: this run lies elsewhere, and so do its metrics."""
    elsewhere = module_runs.path("elsewhere") / "deeper" / "name"
    keys = [f"{key}={value}" for key, value in CHANGED.items()]
    module_runs.train("deeper", *SMALL, *keys, f'output.run_dir="{elsewhere}"', "output.metrics_dir=")
    assert (elsewhere.parent / "metrics" / "name").is_dir()
    assert module_runs.digest("elsewhere/deeper/name") == expected[0]


def test_without_evaluation_the_bits_are_the_same(module_runs, expected, tmp_path, monkeypatch):
    text = module_runs.plan("without", *SMALL).to_toml()
    head, _, rest = text.partition("[eval.bpb]\n")
    assert rest
    config = tmp_path / "without.toml"
    config.write_text(head + rest[rest.index("\n[") + 1 :])
    monkeypatch.setattr(module_runs, "config", config)
    assert module_runs.plan("without").config.eval.bpb is None
    module_runs.train("without")
    assert module_runs.digest("without") == expected[0]
    assert module_runs.losses("without") == expected[1]


def test_another_seed_is_another_state(module_runs, expected):
    """The comparison can fail: a key inside, by its smallest step."""
    module_runs.train("seed", *SMALL, *base(), "random.seed=20261123")
    assert module_runs.digest("seed") != expected[0]


def written(directory: Path, text: str) -> Path:
    """The shards of one text."""
    directory.mkdir()
    (directory / "text.txt").write_text(text)
    prepare([directory / "text.txt"], directory / "out", BytesTokenizer(), Request(shard_tokens=8192), workers=1)
    return directory / "out" / "train"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, Path]:
    """Shards of packaged text, and a copy of them under another path."""
    directory = tmp_path_factory.mktemp("shards")
    first = written(directory / "a", corpus.documents("shakespeare", "heldout")[0][:20_000])
    shutil.copytree(first, directory / "copy" / "of")
    return first, directory / "copy" / "of"


@pytest.fixture(scope="module")
def heldout(tmp_path_factory) -> tuple[Path, Path]:
    """Shards of two other texts."""
    directory = tmp_path_factory.mktemp("heldout")
    return written(directory / "a", "something to be scored, " * 20), written(directory / "b", "or not to be. " * 9)


def same_bits(runs, tmp_path, names, data_of) -> None:
    """Trains once for each name, with the [data] and [eval] that data_of says; the states must be equal."""
    text = runs.plan("any", *SMALL).to_toml()
    start, end = text.index("[data]"), text.index("[batch]")
    digests, plans = [], []
    for index, name in enumerate(names):
        data, heldout = data_of(name)
        config = tmp_path / f"{index}.toml"
        config.write_text(text[:start] + data + text[end:])
        runs.config = config
        sets = [f'eval.bpb.heldout="{heldout}"'] if heldout else []
        plans.append(runs.plan(f"run{index}", *sets))
        runs.train(f"run{index}", *sets)
        digests.append(runs.digest(f"run{index}"))
    assert plans[0].tree_digest != plans[1].tree_digest
    assert plans[0].fingerprint == plans[1].fingerprint
    assert digests[0] == digests[1]


def test_the_path_of_the_shards_changes_no_bit(runs, tmp_path, shards, heldout):
    same_bits(runs, tmp_path, shards, lambda path: (f'[data]\nkind = "shards"\ntrain = "{path}"\n\n', heldout[0]))


def test_the_paths_of_a_mixture_change_no_bit(runs, tmp_path, shards, heldout):
    def data_of(paths):
        sources = ", ".join(f'"{path}"' for path in paths)
        stages = "[[data.stages]]\nuntil_tokens = 160\nweights = [1, 2]\n\n[[data.stages]]\nweights = [2, 1]\n\n"
        return f'[data]\nkind = "mixture"\nsources = [{sources}]\n\n{stages}', heldout[0]

    third = written(tmp_path / "third", "a second source, with other words. " * 100)
    same_bits(runs, tmp_path, [(shards[0], third), (shards[1], third)], data_of)


def test_other_heldout_text_changes_no_bit(runs, tmp_path, shards, heldout):
    data = f'[data]\nkind = "shards"\ntrain = "{shards[0]}"\n\n'
    same_bits(runs, tmp_path, heldout, lambda path: (data, path))


def huggingface(path: Path) -> str:
    """Writes a tokenizer.json of single bytes; the [data.tokenizer] that reads it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(path))
    return f'kind = "huggingface"\npath = "{path}"\nend_of_document = "<end>"\n'


def tiktoken(path: Path) -> str:
    """Writes ranks of single bytes; the [data.tokenizer] that reads them."""
    path.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    return f'kind = "tiktoken"\npath = "{path}"\npattern = "gpt2"\n'


@pytest.mark.parametrize("write", [huggingface, tiktoken])
def test_the_path_of_a_tokenizer_changes_no_bit(runs, tmp_path, monkeypatch, write):
    texts = {part: [corpus.documents("shakespeare", "heldout")[0][:8_000]] for part in ("train", "heldout")}
    monkeypatch.setattr(corpus, "documents", lambda name, part: texts[part])
    head = '[data]\nkind = "corpus"\nname = "shakespeare"\n\n[data.tokenizer]\n'
    paths = [tmp_path / "a.tokenizer", tmp_path / "b.tokenizer"]
    same_bits(runs, tmp_path, paths, lambda path: (f"{head}{write(path)}\n", None))

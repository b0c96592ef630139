"""The environment record: what is in it, and what a difference looks like."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from nmoe.checkpoint import arithmetic, environment
from nmoe.checkpoint.manifest import plain
from nmoe.errors import RunError


@pytest.fixture(scope="module")
def record():
    torch.set_num_threads(1)
    return environment.record("cpu")


def test_it_is_json_that_a_manifest_can_hold(record):
    plain(record, "record")
    assert record.keys() == {"exact", "recorded"}


def test_it_says_what_can_change_bits(record):
    exact = record["exact"]
    assert exact["libraries"]["torch"] == torch.__version__
    assert exact["torch"]["threads"] == torch.get_num_threads()
    assert exact["torch"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert exact["cpu"]["model"]
    assert exact["cpu"]["isa"]
    assert record["recorded"]["pid"] == os.getpid()


def test_two_records_of_one_process_have_the_same_exact_part(record):
    assert environment.compare(record, environment.record("cpu")) == []


def test_another_process_on_this_machine_has_it_too(record):
    code = (
        "import json, sys, torch; torch.set_num_threads(1); from nmoe.checkpoint import environment; "
        "json.dump(environment.record('cpu'), sys.stdout)"
    )
    torch.set_num_threads(1)
    here = environment.record("cpu")
    there = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    # Switches that another test of this process may have moved.
    for part in (here, there):
        for name in (
            "deterministic_algorithms", "cudnn_deterministic", "cudnn_tf32", "float32_matmul_precision",
            "matmul_bf16_reduction", "matmul_fp16_reduction",
        ):  # fmt: skip
            part["exact"]["torch"].pop(name)
    assert environment.compare(there, here) == []
    assert "pid" in {difference.what for difference in environment.compare(there, here, part="recorded")}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("libraries.torch", "2.99"), ("torch.threads", 64), ("cpu.isa", ["avx"]), ("source.rng.py", "0" * 64),
        ("libc", "musl"), ("torch.deterministic_algorithms", "x"), ("arithmetic.exp", "0" * 16),
    ],
)  # fmt: skip
def test_each_difference_is_refused_by_name(record, path, value):
    saved = copy.deepcopy(record)
    section, _, key = path.partition(".")
    if key:
        saved["exact"][section][key] = value
    else:
        saved["exact"][section] = value
    with pytest.raises(RunError, match="N0309") as caught:
        environment.require_same(saved, record, run="runs/x")
    text = caught.value.render()
    assert "--new-lineage" in text
    assert [difference.what for difference in environment.compare(saved, record)] == [path]
    assert f"note: {path}" in text


def test_what_cannot_change_bits_is_not_refused(record):
    saved = copy.deepcopy(record)
    saved["recorded"] |= {"host": "elsewhere", "nvidia_driver": "1", "pid": 1}
    environment.require_same(saved, record, run="runs/x")
    assert {"host", "nvidia_driver", "pid"} <= {d.what for d in environment.compare(saved, record, part="recorded")}


def test_what_one_side_lacks_is_absent(record):
    saved = copy.deepcopy(record)
    del saved["exact"]["libc"]
    assert environment.compare(saved, record)[0].then == "absent"
    assert environment.compare(record, saved)[0].now == "absent"
    assert environment.compare({}, record)


def test_the_table_is_aligned_and_keeps_both_ends_of_long_values():
    lines = environment.table(
        [
            environment.Difference(what="torch", then="2.11", now="2.13"),
            environment.Difference(what="source.model/mla.py", then="a" * 64, now="a" * 63 + "b"),
        ]
    )
    assert lines[0].split() == ["what", "then", "now"]
    assert len({line.index(word) for line, word in zip(lines[:2], ("then", "2.11"), strict=True)}) == 1
    assert lines[2].endswith("b")


def test_the_arithmetic_itself_is_in_it(record):
    """Whatever has chosen other code, a variable that nobody has thought of, say, its results are other bits."""
    torch.set_num_threads(1)
    assert arithmetic.results() == record["exact"]["arithmetic"]
    assert arithmetic.results() == arithmetic.results()
    torch.set_num_threads(3)
    try:
        threads = arithmetic.results()
    finally:
        torch.set_num_threads(1)
    assert threads["sum"] != record["exact"]["arithmetic"]["sum"]
    assert threads["denormal"] == record["exact"]["arithmetic"]["denormal"]


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot be told to flush denormals")
def test_a_switch_that_torch_does_not_tell_of_is_seen(record):
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        now = environment.record("cpu")
    finally:
        torch.set_flush_denormal(False)
    assert "arithmetic.denormal" in {difference.what for difference in environment.compare(record, now)}


def test_a_changed_source_file_is_seen_and_others_are_not(tmp_path):
    leaves = {name for name in environment.SOURCES if name.endswith(".py")}
    taking_part = {"model/mla.py", "model/deep/er.py", "train/step.py", *leaves}
    for name in (*taking_part, "train/run_dir.py", "cli/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    hashes = environment.source_hashes(tmp_path)
    assert set(hashes) == taking_part
    (tmp_path / "model/mla.py").write_text("2")
    changed = environment.source_hashes(tmp_path)
    assert {name for name in hashes if hashes[name] != changed[name]} == {"model/mla.py"}


def test_a_gpus_record_has_triton_and_leaves_the_hosts_threads_aside(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(environment.platform, "device_facts", lambda target: {"name": "a GPU"})
    monkeypatch.setattr(environment, "_cuda_versions", lambda: {"cuda": "13.0"})
    torch.set_num_threads(1)
    one = environment.record("sm_90a")
    torch.set_num_threads(2)
    two = environment.record("sm_90a")
    torch.set_num_threads(1)
    plain(one, "record")
    assert environment.compare(one, two) == []
    assert [d.what for d in environment.compare(one, two, part="recorded")] == ["threads"]
    other = environment.record("sm_100a")["exact"]["triton"]
    assert other["compiler"] == one["exact"]["triton"]["compiler"]
    assert other["backend"] != one["exact"]["triton"]["backend"]


def test_every_name_that_is_left_out_is_one_that_could_be_in(record):
    for name in environment.NOT_ARITHMETIC:
        assert name.partition("/")[0] in environment.SOURCES
        assert name not in record["exact"]["source"]
    assert {"rng.py", "graph.py", "train/step.py", "optim/adamw.py"} <= record["exact"]["source"].keys()

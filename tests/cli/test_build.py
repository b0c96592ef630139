"""The command line: what it prints where, and with which status it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from nmoe import __version__
from nmoe.cli.main import COMMANDS, run
from nmoe.plan.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DEBUG = str(CONFIGS / "debug.toml")


def test_help_lists_every_command_with_its_line(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_there_and_explains_itself(name, capsys):
    assert run([name, "--help"]) == 0
    assert f"nmoe {name}" in capsys.readouterr().out


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"nmoe {__version__}\n"


@pytest.mark.parametrize(
    "args",
    [["biuld"], ["build"], ["build", DEBUG, "--json", "--print"], ["build", DEBUG, "--nonsense"],
     ["build", DEBUG, DEBUG], ["build", DEBUG, "--ranks", "0"], ["build", DEBUG, "--ranks", "x"], ["--nonsense"]],
)  # fmt: skip
def test_a_wrong_command_line_is_status_2(args, capsys):
    assert run(args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err


def test_a_misspelt_command_gets_a_suggestion(capsys):
    assert run(["biuld"]) == 2
    assert "Did you mean 'build'?" in capsys.readouterr().err


def test_json_has_what_programs_need(capsys):
    assert run(["build", DEBUG, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert re.fullmatch(r"[0-9a-f]{64}", plan["fingerprint"])
    assert re.fullmatch(r"[0-9a-f]{64}", plan["tree_digest"])
    assert plan["sections"].keys() >= {"model", "model.moe.router", "optimizer.dense", "output"}
    assert isinstance(plan["parameters"]["total"], int)
    assert plan["parameters"]["active"] < plan["parameters"]["total"]
    assert plan["flops_per_token"] > 0
    assert plan["tokens_per_step"] == 512
    assert plan["total_steps"] == 20
    memory = plan["memory_bytes_per_rank"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert plan["runnable"] is True
    assert plan["resolved"]["model"]["attention"]["kind"] == "mla"
    assert plan["resolved"]["transport"] == {"kind": "rdep"}


def test_print_is_the_default(capsys):
    assert run(["build", DEBUG]) == 0
    default = capsys.readouterr().out
    assert run(["build", DEBUG, "--print"]) == 0
    assert capsys.readouterr().out == default
    assert "[model.attention.local]" in default


def test_set_is_printed_and_hashed(capsys):
    assert run(["build", DEBUG, "--set", "random.seed=5", "--set", 'output.run_dir="runs/other"']) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  seed +5 +--set$", out, re.MULTILINE)
    assert re.search(r'^  run_dir +"runs/other" +--set$', out, re.MULTILINE)


def test_diff_tells_what_differs_and_its_status_whether_it_matters(capsys, tmp_path):
    text = Path(DEBUG).read_text()
    other = tmp_path / "other.toml"
    other.write_text(text.replace("runs/debug", "runs/elsewhere"))
    assert run(["build", DEBUG, "--diff", str(other)]) == 0
    out = capsys.readouterr().out
    assert re.search(r'^  output\.run_dir +"runs/debug" +"runs/elsewhere"$', out, re.MULTILINE)
    assert "same fingerprint" in out
    other.write_text(text.replace("num_layers = 4", "num_layers = 5"))
    assert run(["build", DEBUG, "--diff", str(other)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^  model\.num_layers +4 +5$", out, re.MULTILINE)
    assert re.search(r"^  \[model\] ", out, re.MULTILINE)
    assert "[batch]" not in out
    assert run(["build", DEBUG, "--diff", DEBUG]) == 0
    assert run(["build", DEBUG, "--diff", "nowhere.toml"]) == 2


def test_ranks_size_the_plan(capsys):
    def memory(*args):
        assert run(["build", DEBUG, "--json", *args]) == 0
        return json.loads(capsys.readouterr().out)["memory_bytes_per_rank"]

    one, four, node = memory(), memory("--ranks", "4"), memory("--ranks", "4", "--ranks-per-node", "4")
    assert four["weights"] == one["weights"] > node["weights"]
    assert four["optimizer"] < one["optimizer"]
    assert one["rdep_buffers"] == 0 < node["rdep_buffers"]
    assert run(["build", DEBUG, "--ranks", "3"]) == 2
    assert "3 ranks do not divide the step's 4 microbatches" in capsys.readouterr().err


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_graph_is_a_picture(config, tmp_path, capsys):
    picture = tmp_path / "model.svg"
    assert run(["build", str(config), "--graph", str(picture)]) == 0
    root = ET.parse(picture).getroot()
    words = "".join(root.itertext())
    assert config.stem in words
    assert "attention" in words
    first = picture.read_bytes()
    assert run(["build", str(config), "--graph", str(picture)]) == 0
    assert picture.read_bytes() == first
    chart = tmp_path / "model.mmd"
    assert run(["build", str(config), "--graph", str(chart)]) == 0
    assert chart.read_text().startswith("flowchart TD\n")
    tied = resolve(config).config.model.tie_embeddings
    assert all(("the table as head" in said) == tied for said in (words, chart.read_text()))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["model.png", "model", "nowhere/model.svg"])
def test_graph_into_something_else_is_refused(name, tmp_path, capsys):
    assert run(["build", DEBUG, "--graph", str(tmp_path / name)]) == 2
    assert "error[N0121]" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "nmoe", "build", DEBUG, "--json"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "nmoe", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"nmoe {__version__}\n")


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    import nmoe.plan.resolve

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(nmoe.plan.resolve, "resolve", interrupt)
    assert run(["build", DEBUG]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_signals_that_stop_a_run_interrupt_what_has_not_begun(number):
    """A scheduler's signal in the first second is status 130 with a word, as Ctrl-C is."""
    code = (
        "import nmoe.plan.resolve as r, signal\n"
        f"r.resolve = lambda *a, **k: signal.raise_signal({int(number)})\n"
        "from nmoe.cli.main import main\n"
        f"main(['train', {DEBUG!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["build", DEBUG], ["build", DEBUG, "--json"], ["--help"], ["--version"]])
def test_a_result_that_cannot_be_written_is_said(arguments):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "nmoe", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error[N0001]: the result cannot be written: no space left on device\n --> stdout\n")
    assert "Traceback" not in done.stderr and "= help: " in done.stderr


@pytest.mark.parametrize("arguments", [[DEBUG], ["--set", "random.seed=1"]])
def test_the_schema_belongs_to_no_config(arguments, capsys):
    assert run(["build", "--schema", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "it takes no CONFIG and no --set" in printed.err


def test_closed_streams_are_no_fault():
    command = f'"{sys.executable}" -m nmoe build'
    assert subprocess.run(f'{command} "{DEBUG}" >&-', shell=True, capture_output=True, check=False).returncode == 0
    silent = subprocess.run(f"{command} nowhere.toml 2>&-", shell=True, capture_output=True, text=True, check=False)
    assert (silent.returncode, silent.stdout) == (2, "")


def test_a_fault_of_nmoe_is_not_dressed_up(monkeypatch):
    import nmoe.plan.resolve

    def fault(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(nmoe.plan.resolve, "resolve", fault)
    with pytest.raises(ZeroDivisionError):
        run(["build", DEBUG])

"""What the README shows is true: its config resolves, its commands and make targets exist."""

import re
from pathlib import Path

from nmoe.cli import main
from nmoe.plan.resolve import resolve_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_config_resolves_and_runs() -> None:
    (text,) = blocks("toml")
    plan = resolve_text(text, "README.md")
    assert plan.runnable
    assert plan.config.data.name == "shakespeare"


def test_every_command_it_names_exists_and_explains_itself(capsys) -> None:
    named = set(re.findall(r"\bnmoe ([a-z]+)\b(?=[ `])", "\n".join(blocks("") + re.findall(r"`(nmoe [^`]*)`", README))))
    known = {"compare", "build", "train", "gate", "verify", "export", "data", "bench"}
    assert known <= named
    for name in sorted(named & known):
        assert main.run([name, "--help"]) == 0
        assert "Usage: nmoe " + name in capsys.readouterr().out
    assert named <= known | {"trains"}


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(blocks("")))) <= targets


def test_ci_runs_the_documented_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("exec make test")

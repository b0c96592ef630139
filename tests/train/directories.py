"""Runs' directories without a training."""

import json
from pathlib import Path

from nmoe.plan.resolve import resolve
from nmoe.train import events
from nmoe.train.run_dir import RunDir

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"


def plan_for(path, *sets):
    return resolve(CONFIG, [f"output.run_dir={json.dumps(str(path))}", *sets])


def open_run(path, *sets):
    return RunDir.open(plan_for(path, *sets), config_text=CONFIG.read_text())


def history(path):
    return [event["event"] for event in events.read(path).events]

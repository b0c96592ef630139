"""The deliberate command that rewrites golden files: `make goldens`. A change needs a line in CHANGELOG.md.

plans/NAME.txt   what `nmoe build configs/NAME.toml` prints; NAME has - for /
keys.txt         every key with its bounds (tests/golden/keys.py)
losses/NAME.txt  the first 20 losses of a config that runs on a CPU (tests/golden/losses.py)
"""

from pathlib import Path

from nmoe.plan.render import render
from nmoe.plan.resolve import resolve
from tests.golden.keys import KEYS
from tests.golden.keys import render as render_keys
from tests.golden.losses import LOSSES, SETS
from tests.golden.losses import render as render_losses

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "tests" / "golden" / "plans"


def configs() -> dict[str, Path]:
    """Every config of the repository by the name of its golden file."""
    found = sorted((ROOT / "configs").rglob("*.toml"))
    return {"-".join(path.relative_to(ROOT / "configs").with_suffix("").parts): path for path in found}


def main() -> None:
    wanted = {PLANS / f"{name}.txt": render(resolve(path)) for name, path in configs().items()}
    wanted |= {KEYS: render_keys()}
    wanted |= {LOSSES / f"{name}.txt": render_losses(name) for name in SETS}
    LOSSES.mkdir(exist_ok=True)
    for path in sorted({*PLANS.glob("*.txt"), *LOSSES.glob("*.txt")} - set(wanted)):
        path.unlink()
        print(f"removed   {path.relative_to(ROOT)}")
    for path, text in wanted.items():
        same = path.exists() and path.read_text(encoding="ascii") == text
        path.write_text(text, encoding="ascii")
        print(f"{'unchanged' if same else 'rewrote  '} {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

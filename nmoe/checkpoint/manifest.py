"""What a checkpoint says of itself: the manifest, the HEAD that points at one, and their digests.

A manifest is canonical JSON (RFC 8785). Three hashes hang on it:

    state_digest  SHA-256 of canonical {"state", "step", "tensors": {name: {dtype, shape, slices: [hashes]}}}:
                  the training state and nothing else. Who saved it, when, how often before, from
                  which directory, under which attempt: none of it enters.
    seal          SHA-256 of the canonical manifest without its seal: a manifest whose parent chain is
                  lost (HEAD damaged) can still show that it is whole.
    its own       SHA-256 of the file, which HEAD and the next checkpoint's `parent` hold.

Numbers of the state are integers: a float's canonical text does not tell 1.0 from 1 or -0.0 from 0, so
a float that matters is a tensor, or the text of `float.hex`.

Parsing is strict: exact keys and types, lower-case digests, tensors cut where slices.boundaries cuts
them, and the file must be the canonical text of what it says. Anything else is Damage.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import attrs

from nmoe.checkpoint import format as layout
from nmoe.checkpoint.disk import Damage
from nmoe.plan.canonical import canonical
from nmoe.slices import DTYPE_BYTES, boundaries, slice_count

DEPTH_LIMIT = 16
INTEGER_LIMIT = 2**53 - 1


@attrs.frozen(kw_only=True)
class TensorRecord:
    """One logical tensor: dtype and shape, and the SHA-256 of each of its slices, in order."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Parent:
    """The checkpoint that HEAD named before this one."""

    step: int
    manifest: str


@attrs.frozen(kw_only=True)
class Identity:
    """What a checkpoint belongs to; recorded beside the state, and no part of its digest.

    run: the run's name. lineage, attempt: which unbroken line of states, and which start of it.
    fingerprint, sections, tree_digest: the plan's. data: content digest of every source and tokenizer.
    environment: {"exact": {...}, "recorded": {...}} of nmoe.checkpoint.environment.
    """

    run: str
    lineage: str
    attempt: int
    fingerprint: str
    sections: Mapping[str, str]
    tree_digest: str
    data: Mapping[str, str]
    environment: Mapping[str, Any]


@attrs.frozen(kw_only=True)
class Manifest:
    """One checkpoint. created: UTC, for people only."""

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, TensorRecord]
    identity: Identity
    parent: Parent | None
    created: str

    @property
    def state_digest(self) -> str:
        """SHA-256 over names, shapes, dtypes, bytes and scalars of the training state, in hex."""
        return _digest({"state": self.state, "step": self.step, "tensors": _tensors_json(self.tensors)})

    @property
    def objects(self) -> dict[str, int]:
        """SHA-256 -> bytes of every object that this checkpoint needs."""
        sizes: dict[str, int] = {}
        for name, record in self.tensors.items():
            width = DTYPE_BYTES[record.dtype]
            cuts = boundaries(name, record.shape, record.dtype)
            sizes |= {
                sha256: (stop - start) * width for sha256, (start, stop) in zip(record.slices, cuts, strict=True)
            }
        return sizes

    def encode(self) -> bytes:
        """The file's content, sealed."""
        identity = self.identity
        content = {
            "attempt": identity.attempt,
            "created": self.created,
            "data": dict(identity.data),
            "environment": dict(identity.environment),
            "fingerprint": identity.fingerprint,
            "lineage": identity.lineage,
            "parent": None if self.parent is None else attrs.asdict(self.parent),
            "run": identity.run,
            "sections": dict(identity.sections),
            "state": self.state,
            "state_digest": self.state_digest,
            "step": self.step,
            "tensors": _tensors_json(self.tensors),
            "tree_digest": identity.tree_digest,
            "version": layout.VERSION,
        }
        return canonical({**content, "seal": _digest(content)})

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        """The manifest of a file's content; Damage if it is not one."""
        fields = load(data, "the manifest", _MANIFEST_KEYS)
        if fields["version"] != layout.VERSION:
            raise Damage(f"is of format {fields['version']!r}, this program reads {layout.VERSION}")
        seal = _sha256(fields.pop("seal"), "seal")
        if _digest(fields) != seal:
            raise Damage("does not match its own seal")
        tensors = {name: _tensor(name, record) for name, record in _mapping(fields["tensors"], "tensors").items()}
        parent = None
        if fields["parent"] is not None:
            link = _object(fields["parent"], "parent", ("manifest", "step"))
            parent = Parent(step=_step(link["step"]), manifest=_sha256(link["manifest"], "parent"))
        identity = Identity(
            run=_text(fields["run"], "run"),
            lineage=_text(fields["lineage"], "lineage"),
            attempt=_attempt(fields["attempt"]),
            fingerprint=_sha256(fields["fingerprint"], "fingerprint"),
            sections=_digests(fields["sections"], "sections"),
            tree_digest=_sha256(fields["tree_digest"], "tree_digest"),
            data=_digests(fields["data"], "data"),
            environment=_environment(fields["environment"]),
        )
        manifest = cls(
            step=_step(fields["step"]),
            state=_mapping(fields["state"], "state"),
            tensors=tensors,
            identity=identity,
            parent=parent,
            created=_text(fields["created"], "created"),
        )
        if manifest.state_digest != fields["state_digest"]:
            raise Damage("does not match its own state_digest")
        if manifest.parent is not None and manifest.parent.step >= manifest.step:
            raise Damage(f"names step {manifest.parent.step} as the parent of step {manifest.step}")
        return manifest


_MANIFEST_KEYS = (
    "attempt", "created", "data", "environment", "fingerprint", "lineage", "parent", "run", "seal", "sections",
    "state", "state_digest", "step", "tensors", "tree_digest", "version",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Head:
    """The checkpoint to go on from; manifest is None while there is none yet, and step is then 0."""

    step: int
    manifest: str | None

    def encode(self) -> bytes:
        return canonical({"manifest": self.manifest, "step": self.step, "version": layout.VERSION})

    @classmethod
    def parse(cls, data: bytes) -> "Head":
        """The pointer that a file's content holds; Damage if it is none."""
        fields = load(data, "HEAD", ("manifest", "step", "version"))
        if fields["version"] != layout.VERSION:
            raise Damage(f"is of format {fields['version']!r}, this program reads {layout.VERSION}")
        if fields["manifest"] is None:
            if fields["step"] != 0:
                raise Damage(f"names step {fields['step']!r} and no manifest")
            return cls(step=0, manifest=None)
        return cls(step=_step(fields["step"]), manifest=_sha256(fields["manifest"], "manifest"))


def load(data: bytes, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The object of exactly these keys that `data` is the canonical JSON of; Damage if it is that of none."""
    try:
        fields = _object(json.loads(data.decode("utf-8")), what, keys)
        plain(fields, "the file")
        if canonical(fields) != data:
            raise Damage("is not canonical JSON")
    except (ValueError, TypeError, RecursionError) as cause:
        raise Damage(f"is not canonical JSON: {cause}") from cause
    return fields


def plain(value: Any, path: str, depth: int = 0) -> None:
    """ValueError unless `value` is made of None, booleans, strings, lists, dicts and integers within 2^53 - 1."""
    if depth > DEPTH_LIMIT:
        raise ValueError(f"{path[:80]} nests deeper than {DEPTH_LIMIT} levels")
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if abs(value) > INTEGER_LIMIT:
            raise ValueError(f"{path} is an integer beyond 2^53 - 1")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path} has a key that is no string")
            plain(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            plain(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, float):
        raise ValueError(f"{path} is a float: keep it in a tensor, or as the text of float.hex")
    else:
        raise ValueError(f"{path} is a {type(value).__name__}, which JSON does not have")


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def _tensors_json(tensors: Mapping[str, TensorRecord]) -> dict[str, Any]:
    return {
        name: {"dtype": record.dtype, "shape": list(record.shape), "slices": list(record.slices)}
        for name, record in tensors.items()
    }


def _tensor(name: str, value: Any) -> TensorRecord:
    fields = _object(value, f"tensor `{name[:80]}`", ("dtype", "shape", "slices"))
    if not isinstance(fields["shape"], list) or not isinstance(fields["slices"], list):
        raise Damage(f"gives tensor `{name[:80]}` a shape or slices that are no list")
    shape = tuple(_integer(size, f"a size of tensor `{name[:80]}`") for size in fields["shape"])
    dtype = _text(fields["dtype"], "a dtype")
    layout.check_tensor(name, shape, dtype)
    slices = tuple(_sha256(item, f"a slice of tensor `{name}`") for item in fields["slices"])
    if len(slices) != slice_count(name, shape, dtype):
        raise Damage(f"cuts tensor `{name}` into {len(slices)} slices, not {slice_count(name, shape, dtype)}")
    return TensorRecord(dtype=dtype, shape=shape, slices=slices)


def _object(value: Any, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    fields = _mapping(value, what)
    if fields.keys() != set(keys):
        odd = sorted(fields.keys() ^ set(keys))
        raise Damage(f"has in {what} unknown or missing keys: {', '.join(key[:40] for key in odd[:5])}")
    return fields


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Damage(f"has a {type(value).__name__} where {what} should be an object")
    return cast(dict[str, Any], value)


def _digests(value: Any, what: str) -> dict[str, str]:
    return {name: _sha256(digest, f"{what}.{name[:80]}") for name, digest in _mapping(value, what).items()}


def _sha256(value: Any, what: str) -> str:
    if not isinstance(value, str) or not layout.DIGEST.fullmatch(value):
        raise Damage(f"has in {what} no SHA-256: {value!r:.80}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Damage(f"has in {what} no text: {value!r:.80}")
    return value


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise Damage(f"has in {what} no count: {value!r:.80}")
    return value


def _attempt(value: Any) -> int:
    if not 1 <= _integer(value, "attempt") < 2**31:
        raise Damage(f"has an absurd attempt: {value}")
    return cast(int, value)


def _environment(value: Any) -> dict[str, Any]:
    fields = _object(value, "environment", ("exact", "recorded"))
    return {part: _mapping(record, f"environment.{part}") for part, record in fields.items()}


def _step(value: Any) -> int:
    if not 1 <= _integer(value, "step") < layout.STEP_LIMIT:
        raise Damage(f"has an absurd step: {value}")
    return cast(int, value)

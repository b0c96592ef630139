"""Manifests: the same text for the same thing, digests of the state alone, and nothing else is accepted."""

import hashlib
import json

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint.disk import Damage
from nmoe.checkpoint.manifest import Head, Identity, Manifest, Parent, TensorRecord, load
from nmoe.plan.canonical import canonical

DIGEST = "0123456789abcdef" * 4
IDENTITY = Identity(
    run="r", lineage="l", attempt=2, fingerprint=DIGEST, sections={"model": DIGEST}, tree_digest=DIGEST,
    data={"train": DIGEST}, environment={"exact": {"torch": "2"}, "recorded": {}},
)  # fmt: skip
MANIFEST = Manifest(
    step=7,
    state={"step": 7, "rng": {"rounding": 3}},
    tensors={
        "a.w_EDF": TensorRecord(dtype="float32", shape=(2, 3, 4), slices=("1" * 64, "2" * 64)),
        "b": TensorRecord(dtype="int64", shape=(), slices=("3" * 64,)),
    },
    identity=IDENTITY,
    parent=Parent(step=5, manifest="4" * 64),
    created="2026-01-01T00:00:00+00:00",
)


def reseal(fields: dict) -> bytes:
    """What an attacker or a careless tool would write: consistent digests around whatever it says."""
    body = {key: value for key, value in fields.items() if key != "seal"}
    return canonical({**body, "seal": hashlib.sha256(canonical(body)).hexdigest()})


def fields() -> dict:
    return json.loads(MANIFEST.encode())


def test_parse_gives_back_what_was_encoded():
    assert Manifest.parse(MANIFEST.encode()) == MANIFEST
    assert Manifest.parse(reseal(fields())) == MANIFEST


def test_the_state_digest_is_the_formula():
    tensors = {
        name: {"dtype": record.dtype, "shape": list(record.shape), "slices": list(record.slices)}
        for name, record in MANIFEST.tensors.items()
    }
    text = json.dumps({"state": MANIFEST.state, "step": 7, "tensors": tensors}, sort_keys=True, separators=(",", ":"))
    assert MANIFEST.state_digest == hashlib.sha256(text.encode()).hexdigest()


def test_who_saved_it_is_not_in_the_state_digest():
    other = attrs.evolve(
        MANIFEST, parent=None, created="x",
        identity=attrs.evolve(IDENTITY, run="q", lineage="m", attempt=9, tree_digest="5" * 64, environment={}, data={}),
    )  # fmt: skip
    assert other.state_digest == MANIFEST.state_digest
    assert other.encode() != MANIFEST.encode()


@pytest.mark.parametrize(
    "change",
    [
        {"step": 8},
        {"state": {"step": 7, "rng": {"rounding": 4}}},
        {"tensors": {**MANIFEST.tensors, "b": attrs.evolve(MANIFEST.tensors["b"], slices=("9" * 64,))}},
        {"tensors": {**MANIFEST.tensors, "b": attrs.evolve(MANIFEST.tensors["b"], dtype="uint64")}},
        {"tensors": {**MANIFEST.tensors, "b": attrs.evolve(MANIFEST.tensors["b"], shape=(1,))}},
        {"tensors": {"a.w_EDF": MANIFEST.tensors["a.w_EDF"], "c": MANIFEST.tensors["b"]}},
    ],
)
def test_everything_of_the_state_is_in_the_state_digest(change):
    assert attrs.evolve(MANIFEST, **change).state_digest != MANIFEST.state_digest


def change(**values):
    return lambda f: f.update(values)


def in_tensor(key, value):
    return lambda f: f["tensors"]["a.w_EDF"].update({key: value})


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (change(extra=1), "unknown or missing keys: extra"),
        (lambda f: f.pop("data"), "unknown or missing keys: data"),
        (change(version=2), "of format 2"),
        (change(version="1"), "of format '1'"),
        (change(step=0), "absurd step"),
        (change(step=10**12), "absurd step"),
        (change(step=-1), "no count"),
        (change(step=True), "no count"),
        (change(step="7"), "no count"),
        (change(fingerprint="A" * 64), "no SHA-256"),
        (change(fingerprint="../../x"), "no SHA-256"),
        (change(tree_digest=None), "no SHA-256"),
        (change(attempt=-1), "no count"),
        (change(attempt=0), "absurd attempt"),
        (change(attempt=2**31), "absurd attempt"),
        (change(environment={"exact": {}}), "missing keys: recorded"),
        (change(environment={"exact": {}, "recorded": {}, "other": {}}), "unknown or missing keys: other"),
        (change(environment={"exact": [], "recorded": {}}), "environment.exact should be an object"),
        (change(run=3), "no text"),
        (change(sections=[]), "should be an object"),
        (change(data={"train": 5}), "data.train"),
        (change(parent={"step": 7, "manifest": DIGEST}), "parent of step 7"),
        (change(parent={"step": 5}), "missing keys: manifest"),
        (change(parent={"step": 5, "manifest": "/etc/passwd"}), "no SHA-256"),
        (change(state=[]), "should be an object"),
        (change(state_digest="6" * 64), "state_digest"),
        (change(tensors={"../x": {"dtype": "int8", "shape": [0], "slices": []}}), "no logical name"),
        (in_tensor("shape", [2, 3, -4]), "no count"),
        (in_tensor("shape", [2**53 - 1, 2**53 - 1]), "absurd shape"),
        (in_tensor("shape", "2"), "no list"),
        (in_tensor("dtype", "object"), "none that is stored"),
        (in_tensor("slices", ["1" * 64]), "into 1 slices, not 2"),
        (in_tensor("slices", ["1" * 64, "../" + "2" * 61]), "no SHA-256"),
        (in_tensor("offset", 3), "unknown or missing keys: offset"),
    ],
)
def test_a_resealed_manifest_with_one_absurdity_is_refused(edit, word):
    edited = fields()
    edit(edited)
    with pytest.raises(Damage, match=word):
        Manifest.parse(reseal(edited))


@pytest.mark.parametrize("key", sorted(fields()))
def test_no_field_can_change_without_the_seal(key):
    edited = fields()
    edited[key] = edited[key] + 1 if isinstance(edited[key], int) else "x"
    with pytest.raises(Damage):
        Manifest.parse(canonical(edited))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{", b'{"a":1,"a":1}', b'{"a": 1}', b'{"b":1,"a":1}', b'{"a":1.5}', b'{"a":NaN}',
        b'{"a":1}\n',
        b'{"a":9007199254740992}', b'{"a":' + b"9" * 5000 + b"}", b"\xff\xfe", b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\\ud800"}',
        b"[" * 100_000, b"[" * 100 + b"]" * 100, b'{"a":-0}', b'{"a":1e2}', b'{"a":"\x00"}',
    ],
)  # fmt: skip
def test_texts_that_are_no_canonical_json(data):
    with pytest.raises(Damage):
        Manifest.parse(data)
    with pytest.raises(Damage):
        Head.parse(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(values)
def test_load_reads_back_what_canonical_wrote(value):
    assert load(canonical({"value": value}), "the file", ("value",)) == {"value": value}


@settings(deadline=None, max_examples=400, derandomize=True)
@given(st.integers(0, len(MANIFEST.encode()) - 1), st.binary(min_size=0, max_size=3), st.integers(0, 3))
def test_no_edit_of_bytes_passes(position, inserted, removed):
    data = MANIFEST.encode()
    edited = data[:position] + inserted + data[position + removed :]
    if edited == data:
        return
    with pytest.raises(Damage):
        Manifest.parse(edited)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.sampled_from(sorted(fields().keys() - {"seal"})), values)
def test_a_field_of_another_kind_is_damage_and_no_traceback(key, value):
    edited = {**fields(), key: value}
    try:
        parsed = Manifest.parse(reseal(edited))
    except Damage:
        return
    assert json.loads(parsed.encode())[key] == value


@pytest.mark.parametrize("head", [Head(step=0, manifest=None), Head(step=12, manifest=DIGEST)])
def test_heads_read_back(head):
    assert Head.parse(head.encode()) == head


@pytest.mark.parametrize(
    "fields",
    [
        {"manifest": None, "step": 3, "version": 1}, {"manifest": DIGEST, "step": 0, "version": 1},
        {"manifest": DIGEST, "step": 3}, {"manifest": "x", "step": 3, "version": 1},
        {"manifest": DIGEST, "step": 3, "version": 9},
    ],
)  # fmt: skip
def test_heads_that_are_none(fields):
    with pytest.raises(Damage):
        Head.parse(canonical(fields))

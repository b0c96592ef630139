"""The table is closed: each spec stands in it exactly where a field asks for one, and says what it takes."""

import ast
import importlib
import inspect
import pkgutil
import types
import typing
from pathlib import Path

import attrs
import pytest

import nmoe.registry
from nmoe.plan.structure import fields_of, is_section, type_of
from nmoe.registry.component import TARGETS, Component, Parameter, Problem
from nmoe.registry.table import OUTSIDE, TABLE

SPECS = {cls for kinds in TABLE.values() for cls in kinds.values()}
MODULES = [
    importlib.import_module(f"nmoe.registry.{module.name}") for module in pkgutil.iter_modules(nmoe.registry.__path__)
]


def classes():
    """Every attrs class that the registry defines."""
    for module in MODULES:
        for cls in vars(module).values():
            if isinstance(cls, type) and attrs.has(cls) and cls.__module__ == module.__name__:
                yield cls


def arms(annotation):
    """The classes an annotation allows, without None; the item's class of an array."""
    if isinstance(annotation, types.UnionType):
        return {c for arm in typing.get_args(annotation) if arm is not types.NoneType for c in arms(arm)}
    if typing.get_origin(annotation) is tuple:
        return arms(typing.get_args(annotation)[0])
    return {annotation}


def test_every_spec_is_in_the_table_or_is_a_base_of_one_that_is():
    for cls in classes():
        if cls in (Component, Parameter, Problem) or cls in SPECS:
            continue
        assert any(issubclass(spec, cls) for spec in SPECS), f"{cls.__name__} is nowhere in the table"
        assert not cls.__subclasses__() or all(attrs.has(sub) for sub in cls.__subclasses__())


def test_the_table_has_the_sections_that_fields_ask_for_and_no_other():
    asked = {""}
    for section, kinds in TABLE.items():
        for cls in kinds.values():
            for field in fields_of(cls).values():
                if is_section(field):
                    asked.add(f"{section}.{field.name}".lstrip("."))
    assert asked == set(TABLE)


def test_a_section_offers_what_its_field_accepts():
    for section, kinds in TABLE.items():
        if not section:
            continue
        parent, _, name = section.rpartition(".")
        for owner in TABLE[parent].values():
            field = fields_of(owner).get(name)
            if field is None:
                continue
            for spec in kinds.values():
                fits = any(issubclass(spec, cls) for cls in arms(field.type))
                # A local layer with sizes of its own is an attention with a window, not a LocalWindow.
                assert fits or (section == "model.attention.local" and hasattr(spec, "has_own_sizes")), (section, spec)


def test_a_kind_is_one_lowercase_word_and_kinds_of_a_section_are_distinct_specs():
    for section, kinds in TABLE.items():
        assert len(set(kinds.values())) == len(kinds), section
        for kind in kinds:
            assert kind is None or (kind.isidentifier() and kind == kind.lower())


@pytest.mark.parametrize("cls", sorted(SPECS, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_every_key_says_what_it_is(cls):
    for field in fields_of(cls).values():
        text = field.metadata["help"]
        assert text, field.name
        assert not text.endswith("."), text
        assert text.isascii(), text
        if is_section(field):
            assert all(attrs.has(c) for c in arms(field.type))
            continue
        wanted = type_of(field)
        item = typing.get_args(wanted)[0] if typing.get_origin(wanted) is tuple else wanted
        assert item in (int, float, bool, str), field.name
        optional = isinstance(field.type, types.UnionType)
        assert optional == (field.default is None), f"{field.name}: absence and None are one"
        if field.metadata["choices"] and field.default is not attrs.NOTHING:
            assert field.default in field.metadata["choices"]
        if item is int and not field.metadata["outside"]:
            assert field.metadata["minimum"] is not None, f"{field.name} has no lower bound"


@pytest.mark.parametrize("cls", sorted(SPECS, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_specs_are_frozen_and_keyword_only_and_name_their_targets(cls):
    assert all(field.kw_only for field in attrs.fields(cls))
    assert cls.__setattr__ is not object.__setattr__
    assert set(cls.runs_on) <= set(cls.supports) <= set(TARGETS)


def test_what_stands_outside_is_in_the_table():
    assert set(OUTSIDE) <= set(TABLE)


def imports_of(function: ast.FunctionDef):
    """(module, name) of every import inside a function."""
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def test_every_build_names_something_that_can_be_imported():
    """`build` is the one place that imports run-time code; a name that is not there would fail only in a run."""
    seen = 0
    for module in MODULES:
        tree = ast.parse(Path(inspect.getfile(module)).read_text())
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("build")):
            for name, attribute in imports_of(function):
                seen += 1
                target = importlib.import_module(name)
                if attribute is not None and not hasattr(target, attribute):
                    importlib.import_module(f"{name}.{attribute}")
    assert seen >= 15


@pytest.mark.parametrize("cls", sorted(SPECS, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_a_kind_that_runs_somewhere_can_be_built(cls):
    """A spec of a section with kinds has a `build` of its own on every target on which it says it runs."""
    section = next(name for name, kinds in TABLE.items() if cls in kinds.values())
    if None in TABLE[section] or not cls.runs_on or section.endswith("local"):
        return
    owner = next(base for base in cls.__mro__ if "build" in vars(base))
    assert "NotImplementedError" not in inspect.getsource(owner.build), f"{cls.__name__} has no build"

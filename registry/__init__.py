"""What can be said in a config: one attrs spec per component kind, in one closed table.

This package knows no torch. It is imported as `nmoe.registry`; under its bare name the specs
would exist twice and `isinstance` would lie, so that import is refused.
"""

if __name__ != "nmoe.registry":
    raise ImportError("import this package as nmoe.registry, not as " + __name__)

"""How it runs fast: each kernel beside the plain torch that says what it means.

Imported as `nmoe.kernels`; the bare name would clash with another distribution's.
"""

if __name__ != "nmoe.kernels":
    raise ImportError("import this package as nmoe.kernels, not as " + __name__)

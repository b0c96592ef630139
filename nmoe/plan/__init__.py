"""TOML text to a frozen plan: what will run, what it costs, and the fingerprint that names it.

    source     the text of one file, its limits, and where each key stands in it
    layers     one tree out of `extends`, the file and `--set`, with the origin of every value
    structure  the tree checked against the specs of the closed table, all findings at once
    resolve    the whole way: text to Plan
    canonical, fingerprint, cost, groups, families   what follows from a resolved tree
    render, graph_picture, schema, diff, toml   the plan for people, editors and other programs

Nothing here imports torch. Codes of the findings:

    N0101  a file cannot be read           N0111  a section is missing
    N0102  a file is too large             N0112  an unknown key or section
    N0103  a file is not plain UTF-8       N0113  an unknown or missing kind
    N0104  nested too deep, a word too long N0114  a value of the wrong type
    N0105  not TOML                        N0115  a value out of its bounds
    N0106  a key is written twice          N0116  not one of the choices
    N0107  a value that no config may have N0117  two sections contradict each other
    N0108  `extends` cannot be followed    N0118  not defined on the plan's target
    N0109  `--set` cannot be understood    N0119  ranks that do not divide the work
    N0110  a key is missing                N0120  a size beyond what integers can count
"""

"""A run's model in the layout of the transformers library, read by programs that know nothing of nmoe.

    names      our parameters -> the stock checkpoint's tensors
    config     config.json and generation_config.json
    tokenizer  tokenizer.json, where the tokenizer can be said in one
    weights    safetensors files, with an index where there are several
    card       README.md: what this is and where it comes from
    library    the transformers library, imported so that it finds no folder of ours
    compare    the exported model, loaded by the library, against our own
    place      DIR.partial, which becomes DIR when it is whole
    hf         all of it: `nmoe export`

Codes of the findings:

    N0910  no stock class computes the model       N0915  the exported model is not the run's
    N0911  the output directory is not empty       N0916  the run has gone on meanwhile
    N0912  the transformers library is missing     N0917  the data is not what was trained on
    N0913  another export writes there             N0918  not the tokenizer of the data
    N0914  the plan is not the checkpoint's
"""

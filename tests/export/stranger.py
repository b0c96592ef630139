"""A program that knows nothing of nmoe: loads DIR, compares its logits with a file's, writes text, prints JSON.

python stranger.py DIR FILE, where FILE is safetensors with `ids` (B, S) and `logits` (B*S, V).
"""

import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, file = sys.argv[1:]
given = load_file(file)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(directory)
with torch.no_grad():
    logits = model(given["ids"]).logits.flatten(0, 1)
prompt = tokenizer(tokenizer.bos_token + "KING.", return_tensors="pt", add_special_tokens=False).input_ids
generated = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
text = "Is this a dagger which I see before me?\n\tNaïve café, 火\U0001f525"
print(
    json.dumps(
        {
            "class": type(model).__name__,
            "stored": str(AutoModelForCausalLM.from_pretrained(directory).dtype),
            "difference": float((logits - given["logits"]).abs().max() / given["logits"].abs().max()),
            "context": [model.config.max_position_embeddings, tokenizer.model_max_length],
            "tied": model.lm_head.weight is model.model.embed_tokens.weight,
            "prompt": prompt[0].tolist(),
            "generated": generated[0].tolist(),
            "written": tokenizer.decode(generated[0]),
            "ids": tokenizer(text, add_special_tokens=False).input_ids,
            "text": text,
            "decoded": tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids),
            "end": [model.generation_config.eos_token_id, tokenizer.eos_token_id, model.config.bos_token_id],
            "ours": sorted(name for name in sys.modules if name.split(".")[0] == "nmoe"),
        }
    )
)

"""Model directories with tokenizers that differ, and their merges."""

import json

from model_files import SHAPES, random_arrays, write_model

from gemma2.merging import MergeRequest, merge

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
LETTERS = "abcdefghij"  # ten core tokens; in a model of 16 rows the rest is padding


def write_tokenizer(path, core, extra=(), merges=(), **flags):
    """A tokenizer.json of core tokens with ids 0, 1, ... (or those of a mapping) and added (token, id)."""
    vocab = core if isinstance(core, dict) else {token: index for index, token in enumerate(core)}
    entries = [{"id": index, "content": token} | FLAGS | flags for token, index in extra]
    file = {"added_tokens": entries, "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)}}
    (path / "tokenizer.json").write_text(json.dumps(file))


def model(path, arrays, core=LETTERS, extra=(), dtype="F32", **config):
    rows = len(arrays[EMBEDDING])
    write_model(path, arrays, dtype, config={"vocab_size": rows} | config)
    write_tokenizer(path, core, extra)
    return path


def arrays(seed, rows=16, scale=1.0):
    return random_arrays(seed, scale, SHAPES | {EMBEDDING: (rows, 8)})


def merged(root, *names, method="linear", out="out", **options):
    request = MergeRequest(method=method, models=tuple(root / name for name in names), **options)
    return merge(request, out=root / out), root / out


def config_of(path, name="config.json"):
    return json.loads((path / name).read_text())

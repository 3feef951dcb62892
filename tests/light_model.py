"""Model directories that torch-free checks take for models: a config, headers, a real tokenizer."""

import json
import math
import struct
from pathlib import Path

CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


def light_model(
    path: Path,
    vocabulary: int = 300,
    hidden: int = 8,
    kind: str = "Gemma2ForCausalLM",
    swapped: tuple[str, str] | None = None,
    headed: bool = False,
    **more: object,
) -> Path:
    """Write a model directory. `swapped`: two characters that exchange their ids. headed: with a separate output head.
    more: further keys of config.json."""
    path.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    if headed:
        shapes["lm_head.weight"] = [vocabulary, hidden]
    write_safetensors(path / "model.safetensors", shapes)
    config = {"architectures": [kind], "model_type": "gemma2", "hidden_size": hidden, "num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary, **more}))
    write_tokenizer(path, swapped)
    return path


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file of zeros in fp32."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(position))


def write_tokenizer(path: Path, swapped: tuple[str, str] | None = None) -> None:
    """A tokenizer of single characters with Gemma's control tokens, without a template: Gemma's is taken."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    names = [*CONTROLS, *(chr(code) for code in range(10, 127))]
    ids = {name: number for number, name in enumerate(names)}
    if swapped is not None:
        ids[swapped[0]], ids[swapped[1]] = ids[swapped[1]], ids[swapped[0]]
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in CONTROLS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}))

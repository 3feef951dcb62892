"""The weight files by their headers: which there are, whether they belong together, whether the names fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2.core.json_files import JsonMapping
from gemma2.core.limits import JSON_BYTES
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.sizes import size as bytes_of
from gemma2.merging.inputs.architecture import LM_HEAD
from gemma2.merging.inputs.config_defaults import is_tied
from gemma2.merging.inputs.weight_files import INDEX, PICKLES, WEIGHTS

from .finding import Check, Depth, Diagnosis, fine, problem, warning
from .subject import ADAPTER, POLICY, REWARD, Subject

__all__ = ["CHECKS", "metadata_format"]

MODELS = frozenset({POLICY, REWARD})
WEIGHED = MODELS | {ADAPTER}
LFS = b"version https://git-lfs"
FETCH = "fetch the weight files again: git lfs pull, or hf download"
FLOATS = ("BF16", "F16", "F32", "F64")
AGAIN = "write it again: gemma2 doctor MODEL --fix DIR"
NAMED = 3  # tensors in a message


def _headers(subject: Subject) -> Iterator[Diagnosis]:
    pointers = [file.name for file in subject.weights if _starts_with(file, LFS)]
    if pointers:
        yield problem(f"{_some(pointers)}: a pointer of git lfs, not the weights", FETCH)
    elif subject.header_faults:
        yield problem(subject.header_faults[0], FETCH)
    elif not subject.weights:
        pickles = sorted(path.name for pattern in PICKLES for path in subject.path.glob(pattern))
        if pickles:
            yield problem(
                f"pickles only ({_some(pickles)}), which run code when they are read", "convert them to safetensors"
            )
        else:
            yield problem("there are not any safetensors files", FETCH)
    else:
        size = sum(tensor.nbytes for tensor in subject.tensors.values())
        files = "1 file" if len(subject.weights) == 1 else f"{len(subject.weights)} files"
        yield fine(f"{len(subject.tensors)} tensors in {files}, {bytes_of(size)}")


def _starts_with(file: object, begin: bytes) -> bool:
    try:
        with open(str(file), "rb") as stream:
            return stream.read(len(begin)) == begin
    except OSError:
        return False


def _index(subject: Subject) -> Iterator[Diagnosis]:
    single, index = (subject.path / WEIGHTS).is_file(), (subject.path / INDEX).is_file()
    if single and index:
        yield problem(f"both {WEIGHTS} and {INDEX}: which is meant is a guess", "remove the one that is not meant")
        return
    if fault := subject.fault(INDEX):
        yield problem(fault, AGAIN)
        return
    if not index:
        if subject.weights and not single:
            yield problem(f"{len(subject.weights)} weight files without {INDEX}", AGAIN)
        elif subject.weights:
            yield fine("one file")
        return
    mapping = subject.json(INDEX).get("weight_map")
    places: Mapping[str, object] = mapping if isinstance(mapping, dict) else {}
    missing = sorted({str(file) for file in places.values()} - {file.name for file in subject.weights})
    if missing:
        yield problem(f"the index names {_some(missing)}, which is not there", FETCH)
        return
    wrong = [name for name in places.keys() | subject.tensors.keys() if places.get(name) != _file_of(subject, name)]
    if wrong:
        yield problem(
            f"index and shards disagree on {_some(sorted(wrong))}",
            AGAIN,
        )
        return
    total = subject.json(INDEX).get("metadata")
    stated = total.get("total_size") if isinstance(total, dict) else None
    size = sum(tensor.nbytes for tensor in subject.tensors.values())
    if stated is not None and stated != size:
        yield warning(f"the index says {stated} bytes, the tensors have {size}", AGAIN)
    else:
        yield fine(f"{len(places)} tensors in {len(subject.weights)} shards")


def _file_of(subject: Subject, name: str) -> str | None:
    tensor = subject.tensors.get(name)
    return tensor.file.name if tensor is not None else None


def _names(subject: Subject) -> Iterator[Diagnosis]:
    """Names and shapes of a Gemma 2's tensors."""
    wanted = gemma2_shapes(subject.settings, subject.kind == REWARD)
    if wanted is None:
        return
    held = {name: tensor.shape for name, tensor in subject.tensors.items() if name != LM_HEAD}
    missing, more = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
    shapes = [name for name in wanted.keys() & held.keys() if held[name] != wanted[name]]
    if missing:
        yield problem(f"{len(missing)} tensors are missing: {_some(missing)}; they would be random", FETCH)
    if more:
        yield problem(f"{len(more)} tensors that Gemma 2 does not have: {_some(more)}", "use the weights of a Gemma 2")
    if shapes:
        name = min(shapes)
        text = f"{printable(name)} is {list(held[name])}, config.json asks for {list(wanted[name])}"
        yield problem(f"{len(shapes)} tensors of another shape: {text}", "restore config.json, or the weights")
    if not (missing or more or shapes):
        yield fine(f"all {len(wanted)}, with their shapes")


def gemma2_shapes(settings: JsonMapping, classifier: bool) -> dict[str, tuple[int, ...]] | None:
    """Name -> shape of every tensor of a Gemma 2 with tied embeddings; None where a number is missing."""
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    numbers = [settings.get(key) for key in (*keys, "num_hidden_layers", "vocab_size")]
    if not all(type(number) is int and 0 < number < 10**7 for number in numbers):
        return None
    hidden, inner, heads, groups, head, layers, rows = (int(number or 0) for number in numbers)
    if layers > 1000:
        return None
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads * head, hidden),
        "self_attn.k_proj.weight": (groups * head, hidden),
        "self_attn.v_proj.weight": (groups * head, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    layer |= {f"{norm}_layernorm.weight": (hidden,) for norm in norms}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    found |= {f"model.layers.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()}
    if classifier:
        labels = settings.get("num_labels") or len(settings.get("id2label") or ()) or 1
        found["score.weight"] = (labels if isinstance(labels, int) else 1, hidden)
    return found


def _integers(subject: Subject) -> Iterator[Diagnosis]:
    found = [name for name, tensor in subject.tensors.items() if tensor.dtype not in FLOATS]
    if found:
        dtypes = ", ".join(sorted({subject.tensors[name].dtype for name in found}))
        yield problem(
            f"{len(found)} tensors are {dtypes}: {_some(found)}; they would be read as weights",
            "use the model that this was quantised from",
        )
    elif subject.tensors:
        yield fine("all tensors are floating point")


def _format(subject: Subject) -> Iterator[Diagnosis]:
    lacking = [file.name for file in subject.weights if metadata_format(file) != "pt"]
    if lacking:
        yield warning(
            f"{_some(lacking)} does not say format pt: some versions of transformers refuse it",
            AGAIN,
        )
    elif subject.weights:
        yield fine("format pt")


def metadata_format(file: object) -> str:
    """The format that a safetensors file states, or ""."""
    import json

    with open(str(file), "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > JSON_BYTES:
            return ""
        try:
            found = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            return ""
    metadata = found.get("__metadata__") if isinstance(found, dict) else None
    return str(metadata.get("format", "")) if isinstance(metadata, dict) else ""


def _pickles(subject: Subject) -> Iterator[Diagnosis]:
    found = sorted(path.name for pattern in PICKLES for path in subject.path.glob(pattern))
    if found and subject.weights:
        yield warning(f"{_some(found)} next to the safetensors: other tools may run the code in it", "remove it")
    elif subject.weights:
        yield fine("no pickled weights")


def _head(subject: Subject) -> Iterator[Diagnosis]:
    """A stored head next to a tied embedding: whether both are equal decides what another library makes of it."""
    head, embedding = subject.tensors.get(LM_HEAD), subject.embedding
    if head is None or embedding is None or not is_tied(subject.config):
        return
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same:
        with open(head.file, "rb") as left, open(embedding.file, "rb") as right:
            left.seek(head.offset)
            right.seek(embedding.offset)
            rest = head.nbytes
            while rest and same:
                step = min(rest, 1 << 20)
                same, rest = left.read(step) == right.read(step), rest - step
    if same:
        yield warning(
            f"{LM_HEAD} is a copy of the tied embedding ({head.nbytes / 1e6:.3g} MB)", "save it without the copy"
        )
    else:
        yield problem(
            f"{LM_HEAD} differs from the embedding that config.json ties it to: it would be dropped",
            "set tie_word_embeddings to false if the head was trained, else remove it",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


CHECKS = (
    Check("headers", "every header; pointers of git lfs; pickles alone", Depth.QUICK, WEIGHED, _headers),
    Check("index", "the index against its shards; both kinds of files at once", Depth.QUICK, MODELS, _index),
    Check("names", "names and shapes of the tensors: missing, unexpected", Depth.QUICK, MODELS, _names, gemma2=True),
    Check("integers", "tensors of integers, which would be read as weights", Depth.QUICK, WEIGHED, _integers),
    Check("format", "format pt in the metadata of each file", Depth.QUICK, MODELS, _format),
    Check("pickles", "pickled weights next to the others", Depth.QUICK, WEIGHED, _pickles),
    Check("tied-head", "a stored head next to a tied embedding: equal or not", Depth.FULL, MODELS, _head),
)

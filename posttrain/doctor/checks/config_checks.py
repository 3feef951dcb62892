"""config.json against what Gemma 2 is: the report (2408.00118), Table 1 and section 2, and against the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gemma2.core.errors import InputError
from gemma2.core.foreign.code_keys import refuse_code
from gemma2.core.outputs.safetensors_header import printable

from .finding import Check, Depth, Diagnosis, fine, problem, warning
from .subject import GEMMA2, POLICY, REWARD, Subject

__all__ = ["CHECKS", "SIZES", "size_name"]

MODELS = frozenset({POLICY, REWARD})
RESTORE = "restore config.json of the model that this was made from"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Size:
    """A published size: hidden size, layers, query heads, KV heads, head size, gate or up size, query scale."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    query_pre_attn_scalar: int


# Gemma 2 report, Table 1; "feedforward dim" there is gate and up together.
SIZES = {
    "2B": Size(2304, 26, 8, 4, 256, 9216, 256),
    "9B": Size(3584, 42, 16, 8, 256, 14336, 256),
    "27B": Size(4608, 46, 32, 16, 128, 36864, 144),
}


def size_name(subject: Subject) -> str:
    """The published size by hidden size and layers, or ""."""
    found = subject.settings.get("hidden_size"), subject.settings.get("num_hidden_layers")
    return next((name for name, one in SIZES.items() if (one.hidden_size, one.num_hidden_layers) == found), "")


def _readable(subject: Subject) -> Iterator[Diagnosis]:
    if fault := subject.fault("config.json"):
        yield problem(fault, RESTORE)
    elif not (subject.path / "config.json").is_file():
        yield problem("there is not any config.json", "copy config.json next to the weights")
    elif not subject.architecture:
        named = printable(str(subject.config.get("architectures")))
        yield problem(f"architectures is {named}, not one name", RESTORE)
    elif subject.is_gemma2 and subject.architecture not in GEMMA2:
        yield problem(f"model_type is gemma2, but the architecture is {printable(subject.architecture)}", RESTORE)
    elif subject.is_gemma2 and subject.config.get("model_type") != "gemma2":
        kind = printable(str(subject.config.get("model_type")))
        yield problem(
            f"{subject.architecture} has model_type {kind}: transformers would build another network", RESTORE
        )
    else:
        yield fine(subject.architecture)


def _size(subject: Subject) -> Iterator[Diagnosis]:
    """The numbers of a published size, or of any size those that the tensors have."""
    wrong = [
        f"{key} {subject.settings.get(key)} (tensors: {found})"
        for key, found in _by_tensors(subject).items()
        if subject.settings.get(key) != found
    ]
    if wrong:
        yield problem(f"config.json does not fit the tensors: {', '.join(wrong)}", RESTORE)
        return
    name = size_name(subject)
    if not subject.is_gemma2 or not name:
        yield fine(
            f"the tensors fit: {subject.number('num_hidden_layers')} layers, {subject.number('hidden_size')} wide"
        )
        return
    for key, value in vars(SIZES[name]).items():
        if key != "query_pre_attn_scalar" and subject.settings.get(key) != value:
            wrong.append(f"{key} {subject.settings.get(key)} instead of {value}")
    yield problem(f"not Gemma 2 {name}: {', '.join(wrong)}", RESTORE) if wrong else fine(f"Gemma 2 {name}")


def _by_tensors(subject: Subject) -> dict[str, int]:
    """What the shapes of a decoder's tensors say of its configuration, by key."""
    tensors = subject.tensors
    found: dict[str, int] = {}
    if (embedding := subject.embedding) is not None and len(embedding.shape) == 2:
        found["vocab_size"], found["hidden_size"] = embedding.shape
    layers = {name.split(".layers.", 1)[1].split(".", 1)[0] for name in tensors if ".layers." in name}
    if layers and all(layer.isdecimal() for layer in layers):
        found["num_hidden_layers"] = max(map(int, layers)) + 1
    rows = {
        part: tensor.shape[0]
        for name, tensor in tensors.items()
        for part in ("q_proj", "k_proj", "gate_proj")
        if name.endswith(f"layers.0.self_attn.{part}.weight") or name.endswith(f"layers.0.mlp.{part}.weight")
        if len(tensor.shape) == 2
    }
    head = subject.number("head_dim")
    if head and "q_proj" in rows and rows["q_proj"] % head == 0:
        found["num_attention_heads"] = rows["q_proj"] // head
    if head and "k_proj" in rows and rows["k_proj"] % head == 0:
        found["num_key_value_heads"] = rows["k_proj"] // head
    if "gate_proj" in rows:
        found["intermediate_size"] = rows["gate_proj"]
    return found


def _caps(subject: Subject) -> Iterator[Diagnosis]:
    """Section 2: logits are capped at 50 in each attention layer, at 30 in the final one."""
    found = {key: subject.settings.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    wanted = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    missing = [key for key, value in found.items() if not isinstance(value, int | float) or not value > 0]
    if missing:
        fix = " and ".join(f"set {key} to {wanted[key]:g}" for key in missing)
        yield problem(f"{' and '.join(missing)} is not set: logits are not capped", fix)
    elif list(found.values()) == [30.0, 50.0]:
        yield problem(
            "the two soft caps are exchanged", "set attn_logit_softcapping to 50, final_logit_softcapping to 30"
        )
    elif found != wanted:
        text = ", ".join(f"{key} {value:g}" for key, value in found.items())
        yield warning(
            f"soft caps other than Gemma 2's 50 and 30: {text}", "check that the weights were trained with them"
        )
    else:
        yield fine("50 in attention, 30 at the end")


def _window(subject: Subject) -> Iterator[Diagnosis]:
    window, context = subject.settings.get("sliding_window"), subject.number("max_position_embeddings") or 8192
    if not isinstance(window, int) or window <= 0:
        yield problem(f"sliding_window is {window}: local layers would see everything", "set sliding_window to 4096")
    elif size_name(subject) and window != 4096:
        yield problem(f"sliding_window is {window}, Gemma 2 has 4096", "set sliding_window to 4096")
    elif window > context:
        yield warning(f"sliding_window {window} is longer than the context {context}", "check both")
    else:
        yield fine(f"{window} tokens")


def _layer_types(subject: Subject) -> Iterator[Diagnosis]:
    """Section 2: local and global layers alternate, the first is local."""
    found, layers = subject.settings.get("layer_types"), subject.number("num_hidden_layers") or 0
    wanted = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    fix = "remove layer_types from config.json: transformers fills in Gemma 2's order"
    if not isinstance(found, list) or len(found) != layers:
        count = len(found) if isinstance(found, list) else printable(str(found))
        yield problem(f"layer_types has {count} entries for {layers} layers", fix)
    elif found != wanted:
        first = next(number for number, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other)
        yield problem(f"layer {first} is {printable(str(found[first]))}, Gemma 2 has {wanted[first]} there", fix)
    else:
        yield fine("local and global in turn")


def _query_scale(subject: Subject) -> Iterator[Diagnosis]:
    found, name = subject.settings.get("query_pre_attn_scalar"), size_name(subject)
    heads, hidden = subject.number("num_attention_heads"), subject.number("hidden_size")
    usual = {subject.number("head_dim"), hidden // heads if heads and hidden else None} - {None}
    wanted = {SIZES[name].query_pre_attn_scalar} if name else usual
    if found in wanted:
        yield fine(f"{found}")
    elif isinstance(found, int | float) and found > 0 and not name:
        values = " or ".join(map(str, sorted(wanted, key=str)))
        yield warning(f"query_pre_attn_scalar is {found}, neither head nor hidden / heads ({values})", "check it")
    else:
        values = " or ".join(map(str, sorted(wanted, key=str)))
        yield problem(f"query_pre_attn_scalar is {found} instead of {values}", f"set it to {values}")


def _rope(subject: Subject) -> Iterator[Diagnosis]:
    rope = subject.settings.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    theta, kind = rope.get("rope_theta"), rope.get("rope_type", "default")
    if kind != "default":
        yield warning(
            f"rotary embeddings are scaled ({printable(str(kind))})", "remove rope_scaling unless it was trained so"
        )
    elif theta != 10000:
        yield problem(f"rope_theta is {theta}, Gemma 2 has 10000", "set rope_theta to 10000")
    else:
        yield fine("theta 10000")


def _architecture_details(subject: Subject) -> Iterator[Diagnosis]:
    """Tanh GELU, norms, context, tied embeddings, causal attention."""
    found = subject.settings
    activation = found.get("hidden_activation") or found.get("hidden_act")
    if activation != "gelu_pytorch_tanh":
        yield problem(f"the activation is {printable(str(activation))}", 'set hidden_activation to "gelu_pytorch_tanh"')
    if found.get("rms_norm_eps") != 1e-6:
        yield problem(f"rms_norm_eps is {found.get('rms_norm_eps')}", "set rms_norm_eps to 1e-6")
    if found.get("use_bidirectional_attention"):
        yield problem("attention is bidirectional", "remove use_bidirectional_attention")
    if found.get("tie_word_embeddings") is not True:
        yield problem("tie_word_embeddings is off: the head would be made up", "set tie_word_embeddings to true")
    if found.get("attention_bias"):
        yield problem("attention_bias is on: the biases would be made up", "set attention_bias to false")
    context = found.get("max_position_embeddings")
    if context != 8192:
        yield warning(f"the context is {context}, Gemma 2 was trained with 8192", "set max_position_embeddings to 8192")
    if activation == "gelu_pytorch_tanh" and context == 8192:
        yield fine("tanh GELU, eps 1e-6, context 8192, tied head")


def _dtype(subject: Subject) -> Iterator[Diagnosis]:
    stated = subject.settings.get("dtype")
    stored = sorted({tensor.dtype for tensor in subject.tensors.values()})
    if not stored:
        return
    if subject.is_gemma2 and "F16" in stored:
        yield warning("weights in fp16: Gemma 2's activations exceed it (27B-it is erratic)", "use bf16 or fp32")
    elif stated is not None and DTYPES.get(str(stated)) not in stored:
        shown = printable(str(stated))
        yield warning(
            f"config.json says {shown}, the weights are {', '.join(stored)}", "set dtype to that of the weights"
        )
    else:
        yield fine(", ".join(stored))


def _quantisation(subject: Subject) -> Iterator[Diagnosis]:
    if subject.config.get("quantization_config") is None:
        yield fine("plain weights")
    else:
        fix = "remove quantization_config if the weights are plain; else use the model that it was quantised from"
        yield problem("config.json has a quantization_config: weights would be read as packed numbers", fix)


def _own_code(subject: Subject) -> Iterator[Diagnosis]:
    try:
        refuse_code(subject.path)
    except InputError as error:
        yield problem(error.what, error.hint)
    else:
        yield fine("nothing that selects code")


CHECKS = (
    Check("config", "config.json: readable, one architecture that its type has", Depth.QUICK, MODELS, _readable),
    Check("code", "keys that select code or kernels of others", Depth.QUICK, MODELS, _own_code),
    Check("size", "sizes in config.json against the tensors, and against 2B, 9B, 27B", Depth.QUICK, MODELS, _size),
    Check("soft-caps", "both soft caps are there, and not exchanged", Depth.QUICK, MODELS, _caps, gemma2=True),
    Check("window", "the window of the local layers", Depth.QUICK, MODELS, _window, gemma2=True),
    Check(
        "layer-types", "local and global layers in turn, local first", Depth.QUICK, MODELS, _layer_types, gemma2=True
    ),
    Check("query-scale", "query_pre_attn_scalar: 256, 256, 144", Depth.QUICK, MODELS, _query_scale, gemma2=True),
    Check("rope", "rotary embeddings: theta 10000, not scaled", Depth.QUICK, MODELS, _rope, gemma2=True),
    Check(
        "details",
        "tanh GELU, eps, context, tied, causal, biases",
        Depth.QUICK,
        MODELS,
        _architecture_details,
        gemma2=True,
    ),
    Check("dtype", "the dtype of config.json against that of the weights; fp16", Depth.QUICK, MODELS, _dtype),
    Check("quantisation", "a quantization_config over plain weights", Depth.QUICK, MODELS, _quantisation),
)

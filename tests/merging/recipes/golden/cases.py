"""The inputs and the files whose results mergekit 0.1.5 recorded here: shared by make.py and the test."""

import hashlib

import numpy as np

WIDTH, INNER, VOCABULARY, LAYERS = 4, 6, 16, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SEEDS = {"base": 0, "a": 1, "b": 2, "c": 3}
STEP = 0.3  # size of a task vector beside weights of size 1


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (4, WIDTH),
            "self_attn.k_proj": (2, WIDTH),
            "self_attn.v_proj": (2, WIDTH),
            "self_attn.o_proj": (WIDTH, 4),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def arrays(name: str) -> dict[str, np.ndarray]:
    """The weights of a model in fp32."""
    base = _normal(SEEDS["base"], 1.0)
    step = _normal(SEEDS[name], STEP)
    return base if name == "base" else {key: base[key] + step[key] for key in base}


def _normal(seed: int, scale: float) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: (generator.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes().items()}


def digest() -> str:
    """Of all inputs: a numpy with another stream of random numbers is seen at once."""
    total = hashlib.sha256()
    for name in SEEDS:
        for array in arrays(name).values():
            total.update(array.astype("<f4").tobytes())
    return total.hexdigest()


def models(**parameters: str) -> str:
    """`models:` with the parameters of each."""
    lines = [f"- {{model: {name}, parameters: {{{text}}}}}" for name, text in parameters.items()]
    return "models:\n" + "\n".join(lines) + "\n"


BASE = "base_model: base\n"
WEIGHTED = models(a="weight: 1", b="weight: 2", c="weight: 0.5")
SPARSE = models(a="weight: 1, density: 0.4", b="weight: 2, density: 0.7", c="weight: 0.5, density: 0.2")
MIDDLE = models(a="weight: 1, density: 0.4", b="weight: 2, density: 0.7", c="weight: 0.5, density: 0.3")
T = "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]"
RULES = (
    "[{filter: layers.1., value: 0.2}, {filter: mlp, value: [1, 2]}, {filter: norm, value: 3}, {value: [0.5, 2, 1]}]"
)
SLICES = """slices:
- sources:
  - {model: a, layer_range: [0, 3], parameters: {weight: [0.5, 1]}}
  - {model: b, layer_range: [1, 4], parameters: {weight: [{filter: layers.3.mlp, value: 4}, {value: 2}]}}
- sources:
  - {model: a, layer_range: [2, 4]}
  - {model: b, layer_range: [2, 4]}
  parameters: {weight: [3, 5]}
"""
BASED_SLICES = """slices:
- sources:
  - {model: base, layer_range: [1, 3]}
  - {model: a, layer_range: [2, 4]}
  - {model: b, layer_range: [0, 2]}
  parameters: {lambda: 0.5}
- sources:
  - {model: base, layer_range: [3, 4]}
  - {model: c, layer_range: [0, 1]}
"""
CASES = {
    "linear": f"merge_method: linear\n{WEIGHTED}",
    "linear unnormalised": f"merge_method: linear\n{WEIGHTED}parameters: {{normalize: false}}\n",
    "linear with base_model": f"merge_method: linear\n{BASE}{models(a='', b='')}parameters: {{weight: 1}}\n",
    "linear gradients": f"merge_method: linear\n{models(a='weight: [0, 1, 4]', b='weight: [2, 1]')}",
    "linear filters": f"merge_method: linear\n{models(a=f'weight: {RULES}', b='weight: 1')}",
    "linear levels": (
        f"merge_method: linear\n{models(a='weight: {filter: mlp, value: 2}', b='weight: 3')}"
        "parameters: {weight: 9, normalize: false}\n"
    ),
    "linear slices": f"merge_method: linear\n{SLICES}parameters: {{normalize: false}}\n",
    "slerp": f"merge_method: slerp\nbase_model: a\n{models(b='')}parameters: {{t: 0.3}}\n",
    "slerp base listed last": f"merge_method: slerp\nbase_model: a\n{models(b='', a='')}parameters: {{t: 0.3}}\n",
    "slerp gradients": (
        "merge_method: slerp\nbase_model: a\nslices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n"
        f"  - {{model: b, layer_range: [0, 4]}}\nparameters: {{t: {T}}}\n"
    ),
    "nuslerp": f"merge_method: nuslerp\n{models(a='weight: 1', b='weight: 3')}",
    "nuslerp with base": f"merge_method: nuslerp\n{BASE}{models(base='', a='weight: 1', b='weight: [3, 1]')}",
    "task_arithmetic": f"merge_method: task_arithmetic\n{BASE}{WEIGHTED}parameters: {{lambda: 0.4}}\n",
    "task_arithmetic normalised": (
        f"merge_method: task_arithmetic\n{BASE}{models(base='weight: 7', a='weight: 1', b='weight: 3')}"
        "parameters: {normalize: true}\n"
    ),
    "task_arithmetic slices": f"merge_method: task_arithmetic\n{BASE}{BASED_SLICES}parameters: {{weight: 0.8}}\n",
    "ties": f"merge_method: ties\n{BASE}{SPARSE}",
    "ties unnormalised": f"merge_method: ties\n{BASE}{SPARSE}parameters: {{normalize: false, lambda: 0.5}}\n",
    "ties negative weight": (
        f"merge_method: ties\n{BASE}{models(a='weight: 1', b='weight: -1', c='weight: 0.5')}"
        "parameters: {density: 0.4}\n"
    ),
    "breadcrumbs": f"merge_method: breadcrumbs\n{BASE}{MIDDLE}parameters: {{gamma: 0.1}}\n",
    "breadcrumbs_ties": f"merge_method: breadcrumbs_ties\n{BASE}{MIDDLE}parameters: {{gamma: 0.1}}\n",
    "model_stock": f"merge_method: model_stock\n{BASE}{models(a='', b='', c='')}",
    "sce": f"merge_method: sce\n{BASE}{models(a='', b='', c='')}",
    "sce selected": f"merge_method: sce\n{BASE}{models(a='', b='', c='')}parameters: {{select_topk: 0.5}}\n",
    "ram": f"merge_method: ram\n{BASE}{models(a='', b='', c='')}parameters: {{epsilon: 0.3}}\n",
    "ramplus_tl": f"merge_method: ramplus_tl\n{BASE}{models(a='', b='', c='')}parameters: {{epsilon: 0.3}}\n",
    "ramplus_tl scaled": (
        f"merge_method: ramplus_tl\n{BASE}{models(a='', b='', c='')}parameters: {{epsilon: 0.3, r: 0.7, alpha: 0.9}}\n"
    ),
    "nearswap": f"merge_method: nearswap\n{BASE}{models(a='')}parameters: {{t: [0.1, 0.4]}}\n",
    "arcee_fusion": f"merge_method: arcee_fusion\n{BASE}{models(base='', a='')}",
    "nuslerp rows": (
        f"merge_method: nuslerp\n{models(a='weight: 1', b='weight: 3')}parameters: {{nuslerp_flatten: false}}\n"
    ),
    "nuslerp columns": (
        f"merge_method: nuslerp\n{BASE}{models(a='weight: 1', b='weight: 3')}"
        "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n"
    ),
    "karcher": f"merge_method: karcher\n{models(a='', b='', c='')}",
    "karcher with base_model": f"merge_method: karcher\n{BASE}{models(a='', b='')}",
    "multislerp": f"merge_method: multislerp\n{WEIGHTED}",
    "multislerp with base": f"merge_method: multislerp\n{BASE}{WEIGHTED}",
    "multislerp unnormalised": f"merge_method: multislerp\n{BASE}{WEIGHTED}parameters: {{normalize_weights: false}}\n",
    "passthrough": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources:\n  - model: b\n    layer_range: [1, 4]\n"
        "    parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1}]}\n"
    ),
}
PRECISE = "dtype: float32\nout_dtype: bfloat16\n"  # bf16 in and out, computed in fp32

# Which elements the cases choose: weights and densities of a, b and c, and gamma.
CHOICES = {
    "ties": ((1, 2, 0.5), (0.4, 0.7, 0.2), 0.0),
    "ties unnormalised": ((1, 2, 0.5), (0.4, 0.7, 0.2), 0.0),
    "ties negative weight": ((1, -1, 0.5), (0.4, 0.4, 0.4), 0.0),
    "breadcrumbs": ((1, 2, 0.5), (0.4, 0.7, 0.3), 0.1),
    "breadcrumbs_ties": ((1, 2, 0.5), (0.4, 0.7, 0.3), 0.1),
}

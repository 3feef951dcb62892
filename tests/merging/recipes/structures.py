"""Structures of mergekit files as people publish them: keys and their nesting, with models and numbers of our own.

The models have eight layers: base, a, b and c share an architecture and their tokenizers, lora is an adapter of base.
"""

TWO = """models:
- model: a
  parameters: {weight: 0.5}
- model: b
  parameters: {weight: 0.5}
"""
DENSE = """base_model: base
models:
- model: base
- model: a
  parameters: {density: 0.5, weight: 0.5}
- model: b
  parameters: {density: 0.5, weight: 0.5}
"""
PLAIN = "base_model: base\nmodels: [{model: a}, {model: b}, {model: c}]\n"
PAIR = """slices:
- sources:
  - {model: a, layer_range: [0, 8]}
  - {model: b, layer_range: [0, 8]}
base_model: a
"""
T = """parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
"""
STACK = """slices:
- sources: [{model: a, layer_range: [0, 4]}]
- sources: [{model: b, layer_range: [2, 8]}]
merge_method: passthrough
"""

RUN = {
    "slerp by filters": f"{PAIR}merge_method: slerp\n{T}dtype: bfloat16\n",
    "slerp of models": "models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n",
    "slerp with embed_slerp": f"{PAIR}merge_method: slerp\nparameters: {{t: 0.5, embed_slerp: true}}\n",
    "slerp, dtype below parameters": f"{PAIR}merge_method: slerp\nparameters: {{t: 0.5, dtype: bfloat16}}\n",
    "slerp with tokenizer_source": f"{PAIR}merge_method: slerp\n{T}tokenizer_source: union\n",
    "linear": f"merge_method: linear\n{TWO}dtype: float16\n",
    "linear, weights below parameters": (
        "models: [{model: a}, {model: b}]\nmerge_method: linear\nparameters: {weight: 0.5, normalize: true}\n"
    ),
    "linear, int8_mask at the top": f"merge_method: linear\n{TWO}int8_mask: true\nnormalize: true\n",
    "linear with out_dtype": f"merge_method: linear\n{TWO}dtype: float32\nout_dtype: bfloat16\n",
    "linear with normalize as a number": f"merge_method: linear\n{TWO}parameters: {{normalize: 1.0}}\n",
    "linear by mergekit-multi": f"name: first\nmerge_method: linear\n{TWO}---\nmerge_method: slerp\nbase_model: a\n"
    "models: [{model: a}, {model: first}]\nparameters: {t: 0.3}\n",
    "task_arithmetic": f"merge_method: task_arithmetic\nbase_model: base\n{TWO}",
    "task_arithmetic of an adapter": (
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: base+lora, parameters: {weight: 1.0}}]\n"
    ),
    "task_arithmetic, the base is the only source": (
        "base_model: base+lora\ndtype: bfloat16\nmerge_method: task_arithmetic\nparameters: {normalize: false}\n"
        "slices:\n- sources: [{layer_range: [0, 8], model: base+lora, parameters: {weight: 1.0}}]\n"
    ),
    "ties": f"merge_method: ties\n{DENSE}parameters: {{normalize: true, int8_mask: true}}\ndtype: float16\n",
    "ties with gradients": (
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "- {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}\n"
        "- {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}\n"
        "- {model: c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}\n"
    ),
    "dare_ties": f"merge_method: dare_ties\n{DENSE}parameters: {{int8_mask: true}}\n",
    "dare_ties with chat_template": (
        f"merge_method: dare_ties\n{DENSE}parameters: {{int8_mask: true}}\n"
        "chat_template: auto\ntokenizer_source: base\n"
    ),
    "dare_linear": f"merge_method: dare_linear\n{DENSE}parameters: {{lambda: 0.9}}\n",
    "della": f"merge_method: della\n{DENSE}parameters: {{epsilon: 0.05, lambda: 1.0}}\n",
    "della_linear in modules": """base_model: base
merge_method: della_linear
modules:
  default:
    slices:
    - sources:
      - {layer_range: [0, 8], model: a, parameters: {density: 0.5, epsilon: 0.4, weight: [0.9, 0.2, 0.4, 0.2]}}
      - {layer_range: [0, 8], model: b, parameters: {density: 0.5, epsilon: 0.4, weight: [0.1, 0.9, 1.0, 0.3]}}
      - {layer_range: [0, 8], model: base}
parameters: {lambda: 1.0, normalize: 1.0}
tokenizer: {}
""",
    "models in modules": (
        "merge_method: linear\nmodules: {default: {models: [{model: a, parameters: {weight: 1}}, "
        "{model: b, parameters: {weight: 2}}]}}\n"
    ),
    "breadcrumbs_ties": f"merge_method: breadcrumbs_ties\n{DENSE}parameters: {{gamma: 0.01}}\n",
    "model_stock": f"merge_method: model_stock\n{PLAIN}dtype: bfloat16\n",
    "model_stock with allow_negative_weights": (
        f"merge_method: model_stock\n{PLAIN}parameters: {{allow_negative_weights: true, normalize: true}}\n"
    ),
    "nuslerp": f"merge_method: nuslerp\n{TWO}",
    "nuslerp by rows": f"merge_method: nuslerp\n{TWO}parameters: {{nuslerp_flatten: false}}\ndtype: bfloat16\n",
    "multislerp": f"merge_method: multislerp\n{TWO}parameters: {{normalize_weights: true}}\n",
    "multislerp, weights as they are": f"merge_method: multislerp\n{TWO}parameters: {{normalize_weights: false}}\n",
    "karcher": "merge_method: karcher\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {max_iter: 50}\n",
    "sce": f"merge_method: sce\n{PLAIN}parameters: {{select_topk: 0.15}}\ntokenizer: {{source: base}}\n",
    "arcee_fusion": "merge_method: arcee_fusion\nbase_model: a\nmodels: [{model: a}, {model: b}]\ndtype: bfloat16\n",
    "nearswap": f"{PAIR}merge_method: nearswap\nparameters: {{t: 0.0001}}\n",
    "ramplus_tl": f"merge_method: ramplus_tl\n{PLAIN}parameters: {{r: 0.1, alpha: 0.2}}\n",
    "passthrough": f"{STACK}dtype: bfloat16\n",
    "passthrough, scaled": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 4]}]\n- sources:\n"
        "  - model: a\n    layer_range: [2, 8]\n    parameters:\n      scale:\n"
        "      - {filter: o_proj, value: 0.0}\n      - {filter: down_proj, value: 0.0}\n      - value: 1.0\n"
    ),
    "passthrough with a base in slices": """merge_method: linear
slices:
- base_model: base
  sources: [{model: a, layer_range: [0, 8]}, {model: b, layer_range: [0, 8]}]
parameters: {weight: 0.5}
""",
    "tokens and padding": f"""merge_method: linear
{TWO}tokenizer:
  source: union
  tokens:
    <unk>: {{source: a, force: true}}
  pad_to_multiple_of: 8
dtype: bfloat16
""",
    "a chat template by name": f"merge_method: linear\n{TWO}chat_template: chatml\n",
}
STACKED = ("passthrough", "passthrough, scaled")  # ten layers
REFUSED = {
    "mergekit-moe": (
        "base_model: base\ngate_mode: hidden\nexperts:\n- {source_model: a, positive_prompts: [x]}\n",
        "experts is a key of mergekit-moe, another tool",
    ),
    "mergekit-evolve": (
        "genome: {models: [a, b], merge_method: linear, layer_granularity: 4}\ntasks: [{name: x}]\n",
        "genome is a key of mergekit-evolve, another tool",
    ),
}

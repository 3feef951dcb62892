"""Options of TRL, axolotl, LLaMA-Factory, torchtune, Unsloth and mergekit, and what each is called here: a table.

Facts from trl 1.16, axolotl 0.19, llamafactory 0.9.5 and torchtune 0.6.1.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BATCH", "COMMANDS_ELSEWHERE", "NAMES", "ForeignName"]

T, A, L, H, U, M = "TRL", "axolotl", "LLaMA-Factory", "torchtune", "Unsloth", "mergekit"
TL, TAL = f"{T} and {L}", f"{T}, {A} and {L}"
TRAINER = f"{T} and {A}"


@dataclass(frozen=True)
class ForeignName:
    """What one name of another tool is here.

    tools    who has it
    ours     our keys that mean it, in order of preference: the first that a command has is the answer;
             `trainer.KEY` where TRL's own option is passed on
    how      how a value becomes ours, if it is not the same
    instead  what to do, or why nothing is needed, where a command has none of `ours`
    decides  whether a run without it has other results
    without  a key; commands that have it have no counterpart, since ours means something else there
    """

    tools: str
    ours: tuple[str, ...] = ()
    how: str = ""
    instead: str = ""
    decides: bool = False
    without: str = ""


def _same(tools: str, *ours: str, how: str = "", instead: str = "") -> ForeignName:
    """A name with a counterpart."""
    return ForeignName(tools, ours, how, instead or "this command has no such setting; leave it out")


def _unneeded(tools: str, why: str) -> ForeignName:
    """A name that nothing has to stand for."""
    return ForeignName(tools, instead=f"leave it out: {why}")


def _missing(tools: str, why: str) -> ForeignName:
    """A name without a counterpart, which decides results."""
    return ForeignName(tools, instead=why, decides=True)


# The names whose product is the number of sequences of an optimizer step (`counterparts.py`).
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_size", "per_device_batch_size")

MODEL = ("model", "policy", "teacher")
DATA = ("data", "prompts")
STEPS = ("max_steps", "steps")
TOKENS = ("max_new_tokens",)
ONE_BATCH = "all sequences of an optimizer step; --micro-batch-size are those of a forward pass"
ROOM = "rows of similar length share a batch, so little is padded"
ATTENTION = "auto takes what fits; sdpa has no soft cap, which Gemma 2 needs"
QUANTISED = "only the frozen base of an adapter is quantised: --lora-rank with --base-bits"
PLAIN_LORA = "adapters are plain LoRA: A and B, scaled by alpha / rank"
RULE = "the optimizer is AdamW with one learning rate"
BY_STRATEGY = "--gpus N starts the processes, and --strategy says how they hold the model"
NO_DPO = "there is no DPO here: train a reward model on the pairs (gemma2 reward), then gemma2 rlhf"
TEMPLATE = "turns are rendered by the model's own chat template: gemma2 data inspect PATH --model DIR"

# `batch_size` of a training command is that of an optimizer step.
EVALUATED = ForeignName(
    TAL,
    ("batch_size",),
    instead="leave it out: an evaluation takes the batches of the training",
    without="micro_batch_size",
)

NAMES: dict[str, ForeignName] = {
    # --- models and outputs ---
    "model_name_or_path": _same(TL, *MODEL),
    "model_name": _same(U, *MODEL),
    "base_model": _same(A, *MODEL),
    "student_model_name_or_path": _same(T, "model"),
    "teacher_model_name_or_path": _same(T, "teacher"),
    "ref_model": _same(L, "sft", instead="the start of training is the reference; leave it out"),
    "reward_model": _same(L, "reward", instead="a model with a reward head is what gemma2 reward trains; leave it out"),
    "reward_model_path": _same(T, "reward"),
    "reward_model_name_or_path": _same(T, "reward"),
    "reward_funcs": _same(T, "reward_fn", how="module:function", instead="rewards belong to gemma2 rlhf; leave it out"),
    "output_dir": _same(TAL, "out"),
    "export_dir": _same(L, "out"),
    "overwrite_output_dir": _same(L, "force", how="a switch without a value"),
    "resume_from_checkpoint": _same(TAL, "resume", how="a switch without a value: the last checkpoint is found"),
    "model_revision": _missing(TL, "a hub id means its main revision: download another one and give its directory"),
    "trust_remote_code": _unneeded(TAL, "code of a model repository is never run"),
    "hf_hub_token": _unneeded(L, "log in with `hf auth login`, or set HF_TOKEN"),
    "cache_dir": _unneeded(L, "set HF_HOME for the hub's files"),
    "push_to_hub": _unneeded(TL, "push the finished output with `hf upload`"),
    "hub_model_id": _unneeded(TRAINER, "push the finished output with `hf upload`"),
    "save_safetensors": _unneeded(TRAINER, "outputs are always safetensors"),
    "save_only_model": _unneeded(TRAINER, "checkpoints are removed when the output is complete"),
    "tokenizer_type": _unneeded(A, "the tokenizer of the model is used"),
    "tokenizer_name_or_path": _unneeded(T, "the tokenizer of the model is used"),
    "model_type": _unneeded(A, "the model's config.json names its class"),
    "num_labels": _unneeded(A, "a reward model has one output"),
    "use_fast_tokenizer": _unneeded(L, "the tokenizer of the model is used"),
    "resize_vocab": _missing(L, "the vocabulary stays that of the model"),
    "special_tokens": _missing(A, "the special tokens stay those of the model"),
    # --- data ---
    "dataset_name": _same(TL, *DATA),
    "dataset": _same(L, *DATA, how="paths or hub ids; the columns of dataset_info.json are --columns here"),
    "datasets": _same(A, *DATA, how="paths or hub ids; shapes are recognised (gemma2 data inspect PATH)"),
    "dataset_path": _same(U, *DATA),
    "train_file": _same("transformers", *DATA),
    "eval_dataset": _same(L, "eval_data", "heldout"),
    "test_datasets": _same(A, "eval_data", "heldout"),
    "validation_file": _same("transformers", "eval_data", "heldout"),
    "dataset_config": _unneeded(T, "it belongs to the path, --data ORG/NAME:CONFIG"),
    "dataset_train_split": _unneeded(T, "it belongs to the path, --data ORG/NAME@SPLIT"),
    "dataset_test_split": _unneeded(T, "it belongs to the path, --eval-data ORG/NAME@SPLIT"),
    "dataset_text_field": _missing(T, "texts without turns are for pre-training; write prompt and completion"),
    "dataset_dir": _unneeded(L, "give paths of files"),
    "dataset_num_proc": _unneeded(T, "rows are read in one pass"),
    "dataset_processes": _unneeded(A, "rows are read in one pass"),
    "preprocessing_num_workers": _unneeded(L, "rows are read in one pass"),
    "dataset_prepared_path": _unneeded(A, "nothing is prepared ahead"),
    "overwrite_cache": _unneeded(L, "nothing is prepared ahead"),
    "streaming": _unneeded(L, "rows are read once, and kept as token ids"),
    "max_samples": _same(L, "limit", instead="cut the file, for instance with head -n N rows.jsonl"),
    "interleave_probs": _same(L, "weights", how="separated by commas; shares of the rows of an epoch"),
    "shuffle_dataset": _unneeded(T, "the order of the rows follows from --seed"),
    "val_set_size": _same(A, "eval_fraction", how="a share of the prompts below 1"),
    "val_size": _same(L, "eval_fraction", how="a share of the prompts below 1"),
    "test_split_size": _same(T, "eval_fraction", how="a share of the prompts below 1"),
    "template": _unneeded(L, TEMPLATE),
    "chat_template": _unneeded(f"{A} and {U}", TEMPLATE),
    "eot_tokens": _unneeded(A, "turns end as the chat template of the model ends them"),
    "chat_template_path": _missing(T, TEMPLATE),
    "default_system": _missing(L, "a system text is a column of the rows, system"),
    "default_system_message": _missing(A, "a system text is a column of the rows, system"),
    "tool_format": _missing(L, "tool calls are not learned"),
    # --- lengths ---
    "max_seq_length": _same(f"{U} and earlier {T}", "max_length", instead="--max-new-tokens limits completions"),
    "max_seq_len": _same(H, "max_length", instead="--max-new-tokens limits completions"),
    "model_max_length": _same("FastChat", "max_length", instead="--max-new-tokens limits completions"),
    "cutoff_len": _same(L, "max_length", instead="--max-new-tokens limits completions; leave it out"),
    "sequence_len": _same(A, "max_length", instead="--max-new-tokens limits completions"),
    "max_prompt_length": _unneeded(T, "a prompt that leaves no room for its completion is refused or dropped"),
    "max_completion_length": _same(T, *TOKENS, instead="--max-length limits whole rows"),
    "response_length": _same(T, *TOKENS, instead="--max-length limits whole rows"),
    "excess_length_strategy": _same(A, "on_overlong", how="drop, truncate or error (raise)"),
    "truncation_mode": _unneeded(T, "rows are cut at their end with --on-overlong truncate"),
    # --- batches and steps ---
    "per_device_train_batch_size": _same(TL, "batch_size", "prompts_per_step", how=ONE_BATCH),
    "per_device_batch_size": _same(U, "batch_size", "prompts_per_step", how=ONE_BATCH),
    "gradient_accumulation_steps": _same(TAL, "batch_size", "prompts_per_step", how=ONE_BATCH),
    "per_device_eval_batch_size": EVALUATED,
    "eval_batch_size": EVALUATED,
    "auto_find_batch_size": _unneeded(
        TL, "--micro-batch-size N splits a batch that does not fit; results stay the same"
    ),
    "num_train_epochs": _same(TL, "epochs", instead="the length is a number of steps here: --steps"),
    "num_epochs": _same(A, "epochs", instead="the length is a number of steps here: --steps"),
    "max_steps": _same(TAL, *STEPS),
    "max_steps_per_epoch": _same(H, *STEPS),
    "total_episodes": _unneeded(T, "the length is --steps, each of --prompts-per-step times --n completions"),
    "group_by_length": _unneeded(TRAINER, ROOM),
    "train_sampling_strategy": _unneeded(T, ROOM),
    "sample_packing": _same(A, "packing", how="needs --attention flash_attention_2", instead=f"leave it out: {ROOM}"),
    "neat_packing": _same(L, "packing", how="needs --attention flash_attention_2", instead=f"leave it out: {ROOM}"),
    "packing": _unneeded(TAL, ROOM),
    "pad_to_sequence_len": _unneeded(A, ROOM),
    "eval_sample_packing": _unneeded(A, ROOM),
    "padding_free": _unneeded(T, ROOM),
    "dataloader_num_workers": _unneeded(TL, "rows are in memory as token ids before training starts"),
    "dataloader_pin_memory": _unneeded(TL, "batches are small next to a step"),
    "remove_unused_columns": _unneeded(TRAINER, "columns that nothing reads are named, and not an error"),
    # --- optimizer and schedule ---
    "lr": _same(H, "learning_rate"),
    "lr_scheduler_type": _same(TL, "trainer.lr_scheduler_type"),
    "lr_scheduler": _same(f"{A} and {H}", "trainer.lr_scheduler_type"),
    "lr_scheduler_kwargs": _same(TRAINER, "trainer.lr_scheduler_kwargs"),
    "cosine_min_lr_ratio": _missing(A, "trainer.lr_scheduler_type: cosine_with_min_lr with its lr_scheduler_kwargs"),
    "warmup_ratio": _missing(TAL, "give the number of steps as --warmup-steps"),
    "num_warmup_steps": _same(H, "warmup_steps"),
    "weight_decay": _same(TRAINER, "trainer.weight_decay"),
    "optim": _same(TL, "trainer.optim", how="the default is adamw_torch_fused"),
    "optimizer": _same(A, "trainer.optim", how="the default is adamw_torch_fused"),
    "adam_beta1": _same(TRAINER, "trainer.adam_beta1"),
    "adam_beta2": _same(TRAINER, "trainer.adam_beta2"),
    "adam_epsilon": _same(TRAINER, "trainer.adam_epsilon"),
    "gradient_clipping": _same("DeepSpeed", "max_grad_norm"),
    "clip_grad_norm": _same(H, "max_grad_norm"),
    "neftune_noise_alpha": _same(TRAINER, "trainer.neftune_noise_alpha"),
    "label_smoothing_factor": _same(TRAINER, "trainer.label_smoothing_factor"),
    "loraplus_lr_ratio": _missing(L, RULE),
    "embedding_lr": _missing(A, RULE),
    "use_galore": _missing(L, RULE),
    "use_badam": _missing(L, RULE),
    "use_muon": _missing(L, RULE),
    "random_state": _same(U, "seed"),
    "random_seed": _same(M, "seed"),
    "data_seed": _unneeded(T, "--seed is the seed of every random choice"),
    # --- LoRA ---
    "lora_r": _same(f"{T} and {A}", "lora_rank"),
    "r": _same(U, "lora_rank"),
    "lora_target": _same(L, "lora_targets", how="separated by commas; leave it out for all linear layers"),
    "lora_target_modules": _same(TRAINER, "lora_targets", how="separated by commas; left out: all linear layers"),
    "target_modules": _same(U, "lora_targets", how="separated by commas; left out: all linear layers"),
    "lora_attn_modules": _same(H, "lora_targets", how="separated by commas; left out: all linear layers"),
    "lora_target_linear": _unneeded(A, "all linear layers are adapted unless --lora-targets names some"),
    "use_peft": _unneeded(T, "--lora-rank above 0 trains an adapter"),
    "finetuning_type": _unneeded(L, "--lora-rank above 0 trains an adapter, 0 all weights"),
    "adapter": _unneeded(A, "--lora-rank above 0 trains an adapter"),
    "lora_modules_to_save": _missing(TRAINER, PLAIN_LORA),
    "additional_target": _missing(L, PLAIN_LORA),
    "use_dora": _missing(TL, PLAIN_LORA),
    "peft_use_dora": _missing(A, PLAIN_LORA),
    "use_rslora": _missing(TL, f"{PLAIN_LORA}; for alpha / sqrt(rank) give --lora-alpha ALPHA * sqrt(RANK)"),
    "peft_use_rslora": _missing(A, f"{PLAIN_LORA}; for alpha / sqrt(rank) give --lora-alpha ALPHA * sqrt(RANK)"),
    "pissa_init": _missing(L, PLAIN_LORA),
    "adapter_name_or_path": _missing(L, "merge the adapter first: gemma2 merge linear ADAPTER --out DIR"),
    "lora_model_dir": _missing(A, "merge the adapter first: gemma2 merge linear ADAPTER --out DIR"),
    "freeze_trainable_layers": _missing(L, "all weights are trained, or an adapter (--lora-rank)"),
    "unfrozen_parameters": _missing(A, "all weights are trained, or an adapter (--lora-rank)"),
    "merge_lora": _same(A, "lora_output", how="merged or adapter"),
    # --- precision and memory ---
    "load_in_4bit": _same(f"{T}, {A} and {U}", "base_bits", how="with --lora-rank", instead=QUANTISED),
    "load_in_8bit": _same(f"{T}, {A} and {U}", "base_bits", how="with --lora-rank", instead=QUANTISED),
    "quantization_bit": _same(L, "base_bits", how="with --lora-rank", instead=QUANTISED),
    "bnb_4bit_quant_type": _unneeded(T, "4 bits are NF4"),
    "bf16": _unneeded(TAL, "bf16 is on where there is a GPU, with fp32 weights; --set trainer.bf16=false turns it off"),
    "fp16": _unneeded(TAL, "a GPU computes in bf16, which Gemma 2 needs: fp16 overflows"),
    "tf32": _unneeded(TRAINER, "a GPU computes in bf16, which TF32 does not touch"),
    "pure_bf16": _missing(L, "trained weights stay fp32; bf16 is the arithmetic of a GPU"),
    "dtype": _unneeded(T, "trained weights are fp32; a GPU computes in bf16"),
    "torch_dtype": _unneeded(T, "trained weights are fp32; a GPU computes in bf16"),
    "gradient_checkpointing": _unneeded(TAL, "it is on where there is a GPU: trainer.activation_checkpointing"),
    "use_gradient_checkpointing": _unneeded(U, "it is on where there is a GPU: trainer.activation_checkpointing"),
    "disable_gradient_checkpointing": _unneeded(L, "--set trainer.activation_checkpointing=false turns it off"),
    "gradient_checkpointing_kwargs": _unneeded(TRAINER, "it is on where there is a GPU"),
    "enable_activation_checkpointing": _unneeded(H, "it is on where there is a GPU"),
    "attn_implementation": _same(TRAINER, "attention", how=ATTENTION, instead="leave it out: attention is auto"),
    "flash_attn": _same(L, "attention", how=ATTENTION, instead="leave it out: attention is auto"),
    "flash_attention": _same(A, "attention", how=ATTENTION, instead="leave it out: attention is auto"),
    "sdp_attention": _same(A, "attention", how=ATTENTION, instead="leave it out: attention is auto"),
    "use_liger_kernel": _unneeded(TL, "it saves memory only; results do not depend on it"),
    "enable_liger_kernel": _unneeded(L, "it saves memory only; results do not depend on it"),
    "torch_compile": _unneeded(TRAINER, "it changes speed only; results do not depend on it"),
    "deepspeed": _unneeded(TAL, BY_STRATEGY),
    "fsdp": _unneeded(TAL, BY_STRATEGY),
    "fsdp_config": _unneeded(TAL, BY_STRATEGY),
    "accelerate_config": _unneeded(T, BY_STRATEGY),
    "ddp_timeout": _unneeded(TL, BY_STRATEGY),
    "device_map": _unneeded(TL, BY_STRATEGY),
    "use_unsloth": _unneeded(L, "it changes speed only; results do not depend on it"),
    # --- evaluation, checkpoints, logs ---
    "eval_steps": _same(TAL, "eval_every"),
    "evals_per_epoch": _unneeded(A, "--eval-every N counts optimizer steps"),
    "eval_strategy": _unneeded(TL, "--eval-every N counts optimizer steps"),
    "evaluation_strategy": _unneeded(TL, "--eval-every N counts optimizer steps"),
    "save_steps": _same(TAL, "save_every"),
    "saves_per_epoch": _unneeded(A, "--save-every N counts optimizer steps"),
    "save_strategy": _unneeded(TL, "--save-every N counts optimizer steps"),
    "save_total_limit": _unneeded(TAL, "two checkpoints are kept until the output is complete"),
    "logging_steps": _same(TAL, "log_every"),
    "log_every_n_steps": _same(H, "log_every"),
    "logging_dir": _unneeded(TL, "the figures are in metrics.jsonl of the output"),
    "logging_strategy": _unneeded(TL, "--log-every N counts optimizer steps"),
    "plot_loss": _unneeded(L, "gemma2 report OUT draws the curves"),
    "run_name": _unneeded(TL, "trackers take it from their environment variables"),
    "wandb_project": _same(A, "report_to", how="give wandb; the project comes from WANDB_PROJECT"),
    "use_wandb": _same(A, "report_to", how="give wandb"),
    "use_tensorboard": _same(A, "report_to", how="give tensorboard"),
    "use_swanlab": _unneeded(L, "--report-to takes tensorboard, wandb and trackio"),
    "load_best_model_at_end": _same(TL, "keep", how="best, with --eval-every N"),
    "metric_for_best_model": _unneeded(TL, "--keep best means the lowest held-out loss"),
    "early_stopping_patience": _same(A, "patience"),
    "early_stopping_steps": _same(L, "patience"),
    "do_train": _unneeded(TL, "the command trains"),
    "do_eval": _unneeded(TL, "held-out figures are always measured (--eval-fraction)"),
    "stage": _unneeded(L, "the command is the stage: gemma2 sft, gemma2 reward, gemma2 rlhf"),
    # --- losses ---
    "train_on_inputs": _missing(A, "only turns of the model are learned"),
    "train_on_prompt": _missing(L, "only turns of the model are learned"),
    "mask_history": _unneeded(L, "of prompt and completion only the completion is learned, of messages every turn"),
    "completion_only_loss": _unneeded(T, "only turns of the model are learned"),
    "assistant_only_loss": _unneeded(T, "only turns of the model are learned"),
    "center_rewards_coefficient": _same(TRAINER, "center_coefficient", instead="it belongs to gemma2 reward"),
    "pref_beta": _missing(L, NO_DPO),
    "pref_loss": _missing(L, NO_DPO),
    "dpo_beta": _missing(A, NO_DPO),
    "rl_beta": _missing(A, NO_DPO),
    "loss_type": _missing(T, NO_DPO),
    "rl": _missing(A, NO_DPO),
    # --- RL and sampling ---
    "num_generations": _same(T, "n"),
    "rloo_k": _same(T, "n"),
    "kl_coef": _same(T, "beta"),
    "init_kl_coef": _same(T, "beta"),
    "num_return_sequences": _same("transformers", "n"),
    "num_ppo_epochs": _unneeded(T, "each batch is used once (REINFORCE)"),
    "ppo_epochs": _unneeded(L, "each batch is used once (REINFORCE)"),
    "num_iterations": _unneeded(T, "each batch is used once (REINFORCE)"),
    "epsilon": _unneeded(T, "each batch is used once (REINFORCE), so no ratio is clipped"),
    "cliprange": _unneeded(T, "each batch is used once (REINFORCE), so no ratio is clipped"),
    "use_vllm": _same(T, "engine", how="give vllm"),
    "infer_backend": _same(L, "engine", how="transformers or vllm"),
    "vllm_server_base_url": _same(T, "vllm_server_url"),
    "vllm_gpu_memory_utilization": _same(T, "vllm_memory"),
    "vllm_tensor_parallel_size": _same(T, "vllm_tensor_parallel"),
    "ref_model_mixup_alpha": _same(T, "mu", how="EMA rate per step; here 1 - alpha", instead="it belongs to rlhf"),
    "sync_ref_model": _same(T, "anchor", how="ema", instead="it belongs to rlhf"),
    "lmbda": _same(T, "on_policy_fraction"),
    # --- mergekit-yaml ---
    "copy_tokenizer": _unneeded(M, "the tokenizer is copied; --tokenizer chooses another"),
    "tokenizer_source": _same(M, "tokenizer"),
    "lazy_unpickle": _unneeded(M, "tensors are streamed"),
    "low_cpu_memory": _unneeded(M, "tensors are streamed"),
    "cuda": _unneeded(M, "merges run on the CPU, as fast as the disk"),
    "read_to_gpu": _unneeded(M, "merges run on the CPU, as fast as the disk"),
    "allow_crimes": _unneeded(M, "models of other architectures are refused"),
    "out_shard_size": _unneeded(M, "shards have 5 GB"),
    "write_model_card": _unneeded(M, "every output has a card"),
    "out_dtype": _same(M, "dtype"),
}

# Sub-commands of other tools -> what to type here.
COMMANDS_ELSEWHERE = {
    "train": "choose the step: gemma2 sft, gemma2 reward, gemma2 rlhf",
    "finetune": "write gemma2 sft",
    "rm": "write gemma2 reward",
    "dpo": NO_DPO,
    "orpo": NO_DPO,
    "simpo": NO_DPO,
    "kto": NO_DPO,
    "ppo": "write gemma2 rlhf (REINFORCE with a leave-one-out baseline)",
    "grpo": "write gemma2 rlhf (REINFORCE with a leave-one-out baseline)",
    "rloo": "write gemma2 rlhf",
    "gkd": "write gemma2 distill",
    "distillation": "write gemma2 distill",
    "preprocess": "nothing is prepared ahead: gemma2 data inspect PATH shows how rows are read",
    "api": "serve the output with vLLM: vllm serve DIR",
    "webui": "there is no web page to train from; gemma2 report OUT writes a page about a run",
    "vllm-serve": "start the server with vLLM itself: vllm serve DIR",
    "merge-lora": "write gemma2 merge linear ADAPTER --out DIR",
    "evaluate": "write gemma2 eval",
}

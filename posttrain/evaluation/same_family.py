"""Whether the policies of a front can be compared: models of one vocabulary, and a line of one architecture."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2.core.errors import InputError
from gemma2.merging.inputs.architecture import LM_HEAD, classifies
from gemma2.merging.inputs.checkpoint import open_checkpoint
from gemma2.merging.inputs.compatibility import check_same_tokenizer
from gemma2.posttrain.models.loading import read_config
from gemma2.posttrain.runs.run_directory import Parent

__all__ = ["check_policies"]


def check_policies(parents: Sequence[Parent]) -> None:
    """Refuse reward models instead of policies, another vocabulary than that of the SFT policy, and a line between two
    architectures."""
    policies = [parent for parent in parents if parent.role in ("sft", "policies", "init", "merged")]
    first = open_checkpoint(policies[0].path, f"--{policies[0].role}")
    for parent in policies:
        named = f"--{parent.role} {parent.path}"
        config = read_config(parent.path)
        if classifies(config):
            raise InputError(f"{named} is a reward model, not a language model", "name it as --reward")
        sizes = config.get("vocab_size"), first.config.get("vocab_size")
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{named} has a vocabulary of {sizes[0]}, --sft {policies[0].path} one of {sizes[1]}",
                "compare policies of one family",
            )
        try:
            check_same_tokenizer(first, open_checkpoint(parent.path, f"--{parent.role}"))
        except InputError as error:
            raise InputError(error.what, "compare policies of one family") from error
    ends = {parent.role: open_checkpoint(parent.path, f"--{parent.role}") for parent in policies}
    if "merged" in ends:
        shapes = [
            {name: tensor.shape for name, tensor in end.tensors.items() if name != LM_HEAD}
            for end in (ends.get("init", ends["sft"]), ends["merged"])
        ]
        if shapes[0] != shapes[1]:
            raise InputError("--init and --merged have different tensors", "give two policies of one architecture")

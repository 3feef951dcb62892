"""The metrics that the training commands log, for alerts about stages that have not begun."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["HELDOUT", "is_expected"]

HELDOUT = "heldout_"
# Every training; then SFT, distillation, reward models, RL. `rewards/NAME` has the name that a user gave to it.
STEPS = {
    *("loss", "gradient_norm", "clipped", "learning_rate", "epoch", "entropy"),
    *("mean_token_accuracy", "on_policy", "divergence", "heldout_loss"),
    *("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "heldout_calibration_error"),
    *(
        "heldout_accuracy",
        "heldout_accuracy_error",
        "heldout_accuracy_chosen_longer",
        "heldout_accuracy_chosen_shorter",
    ),
    *("heldout_longer_chosen", "heldout_longer_wins", "heldout_margin", "heldout_reward_length_correlation"),
    *("heldout_reward_mean", "heldout_reward_std", "reward_length_correlation", "vllm_mismatch"),
    *("reward", "reward_std", "reward_std_in_group", "kl_anchor", "kl", "length", "truncated", "distinct_2"),
}
PARTS = ("_se", "_low", "_high")  # error and interval of a figure of an evaluation


def is_expected(name: str, seen: Collection[str] = ()) -> bool:
    """Whether a metric of this name was logged, or may be by a stage that has not begun."""
    plain = name
    for part in PARTS:
        plain = plain.removesuffix(part)
    shown = {name, plain, plain.removeprefix(HELDOUT)}
    return name in seen or bool(shown & STEPS) or plain.removeprefix(HELDOUT).startswith("rewards/")

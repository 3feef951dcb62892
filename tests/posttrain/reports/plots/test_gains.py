"""The headline in words: what a model gains, and what it loses against the best single run."""

from gemma2.posttrain.reports.plots.gains import gain_sentences

POINT = {
    "name": "a", "label": "SLERP 2", "single": "RL 1.2",
    "reward_over_single": 0.22, "reward_over_single_se": 0.06, "reward_over_single_low": 0.1,
    "reward_over_single_high": 0.34,
    "judge_over_single": -0.021, "judge_over_single_se": 0.008, "judge_over_single_low": -0.037,
    "judge_over_single_high": -0.005,
    "accuracy_over_single": -0.045, "accuracy_over_single_se": 0.015, "accuracy_over_single_low": -0.074,
    "accuracy_over_single_high": -0.015,
}  # fmt: skip


def test_what_is_lost_against_the_best_single_run_is_said_next_to_the_gain():
    sentences = list(gain_sentences(POINT, "distilled"))
    assert sentences[0].startswith("SLERP 2 gains +0.22 ± 0.06 reward over the best single run at no more KL (RL 1.2)")
    assert sentences[1] == (
        "Against that run SLERP 2 is worse in judge (−0.021 ± 0.008) and accuracy (−4.5 ± 1.5 points)."
    )


def test_a_loss_within_chance_is_not_said():
    chance = {"judge_over_single_high": 0.001, "accuracy_over_single_high": 0.001}
    assert len(list(gain_sentences(POINT | chance, "distilled"))) == 1


def test_a_model_that_another_point_dominates_is_said_to_be_off_the_front():
    off = " ".join(gain_sentences(POINT | {"on_front": False}, "distilled"))
    assert "SLERP 2 is not on the front: another measured point has at least its reward at no more KL." in off
    assert "front" not in " ".join(gain_sentences(POINT | {"on_front": True}, "distilled"))

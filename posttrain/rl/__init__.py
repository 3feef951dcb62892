"""RL from a reward, with the KL anchored to an EMA of the policy (WARP, 2406.16768, section 3.1)."""

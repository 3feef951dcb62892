"""Text from a teacher or a policy: engines, conversations, journals, best-of-n."""

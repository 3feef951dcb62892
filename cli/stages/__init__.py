"""Commands that write an output; each can be a stage of a pipeline."""

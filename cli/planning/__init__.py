"""`gemma2 plan COMMAND`, and the tables of a plan."""

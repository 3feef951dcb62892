"""Pipelines: a DAG of the suite's own commands, with references, skipping, resume, executors and lineage."""

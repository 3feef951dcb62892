"""Commands around the stages: pipelines, reports, and views of models, runs and recipes."""

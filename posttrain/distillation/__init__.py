"""Distillation: divergences, teachers live and cached, the student's own answers."""

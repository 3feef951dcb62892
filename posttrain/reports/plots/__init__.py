"""Figures: fronts, curves, heat maps, and numbers as text."""

"""Graphs of stages and of lineages: layout, lanes, SVG, Mermaid and text."""

"""Weights of other tools: read in their layouts, and written in them."""

"""Exact rearrangements of a graph that rules are made of: splitting, grouping and scaling channels."""

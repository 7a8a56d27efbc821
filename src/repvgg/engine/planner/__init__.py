"""Planner: algorithm selection, layouts, memory and the list of kernel calls of a network."""

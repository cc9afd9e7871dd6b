"""Measurements of speed and memory: the plain path against the default, in turns in one process."""

"""Measurements against named peers; each file says how to run it."""

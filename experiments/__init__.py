"""Experiments: what is measured, one folder each."""

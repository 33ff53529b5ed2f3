"""Tests of the reference table."""

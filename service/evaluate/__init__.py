"""Frozen-feature evaluation."""

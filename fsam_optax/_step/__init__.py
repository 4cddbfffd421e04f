"""The step: two front ends around a base optimizer."""

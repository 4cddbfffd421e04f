"""Flax NNX modules as pure functions of their parameters; needs `flax`."""

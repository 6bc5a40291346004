"""A run from its config to its result; ``fit.fit`` is the one entry."""

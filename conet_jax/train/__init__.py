"""Training as pure functions: batches, a step, a chunk of steps, ranks."""

"""Training steps as functions to time: each call goes on from where the last one ended."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from conet_jax.run.experiment import Experiment
from conet_jax.run.start import initial_state
from conet_jax.train.chunk import train_chunk
from conet_jax.train.state import settle_in_place


def epoch_runner(
    experiment: Experiment, num_steps: int, program: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """Our step as in training: sampling and planning within the program."""
    holder = [initial_state(experiment)]
    program = program or partial(
        train_chunk,
        model=experiment.model,
        plan=experiment.plan,
        settings=experiment.settings,
        num_steps=num_steps,
    )
    start = np.int32(0)

    def once() -> None:
        arguments = experiment.interactions, experiment.sampling_key, start, start, experiment.hyper
        holder[0], _ = jax.block_until_ready(program(holder[0], *arguments))

    once()
    holder[0] = settle_in_place(holder[0], experiment.hyper.learning_rate)
    return once

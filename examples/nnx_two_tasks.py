"""Our losses in a model that is not CoNet: two tasks share a trunk, in flax.nnx.

python examples/nnx_two_tasks.py

``joint_loss`` weighs the two tasks; ``add_l1`` before Adam is the lasso on the trunk's weights: of
20 inputs the first four matter, and the trunk learns to leave out the others.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from conet_jax.losses import joint_loss
from conet_jax.optimizers import add_l1


class TwoTasks(nnx.Module):
    """A shared hidden layer and one logit a task."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.trunk = nnx.Linear(20, 16, rngs=rngs)
        self.heads = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns a logit a task, f32[n, 2]."""
        return self.heads(nnx.relu(self.trunk(x)))


def examples(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Inputs f32[n, 20] and labels f32[n, 2] of both tasks."""
    x = jax.random.normal(key, (n, 20))
    return x, jnp.stack([x[:, 0] * x[:, 1] > 0, x[:, 2] + x[:, 3] > 0], axis=1).astype(float)


def loss(model: TwoTasks, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The first task counts .7, the second .3."""
    one, two = model(x).T
    return joint_loss(one, labels[:, 0], two, labels[:, 1], target_weight=0.7, reduction="mean")


def is_trunk(params: nnx.State) -> nnx.State:
    """The parameters under the lasso: the trunk's weights."""
    return jax.tree.map_with_path(
        lambda path, _: "trunk" in str(path) and "kernel" in str(path), params
    )


@nnx.jit
def step(model: TwoTasks, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> None:
    """One step."""
    optimizer.update(model, nnx.grad(loss)(model, x, labels))


model = TwoTasks(nnx.Rngs(0))
optimizer = nnx.Optimizer(
    model, optax.chain(add_l1(3e-3, mask=is_trunk), optax.adam(1e-2)), wrt=nnx.Param
)
for i in range(600):
    step(model, optimizer, *examples(jax.random.fold_in(jax.random.key(0), i), 256))
x, labels = examples(jax.random.key(1), 4096)
right = ((model(x) > 0) == (labels > 0)).mean(axis=0)
weights = jnp.abs(model.trunk.kernel[...]).mean(axis=1)
print(f"accuracy {right[0]:.3f} and {right[1]:.3f}")
print(
    f"mean weight of inputs that matter {weights[:4].mean():.3f}, others {weights[4:].mean():.4f}"
)

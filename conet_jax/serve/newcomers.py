"""Users who are not in the data, given by lists of their items.

What a model makes of them depends on what a user is to it:

- Factors of implicit ALS, and the views of the recipe: solved for from the items as in the fit,
  with the items' factors as they are.
- EASE: the items themselves, which is what it scores for anyone.
- EMCDR: the source's factors, solved for from the source items, and through its map.
- A trained embedding: predicted from the user's source history by a linear map, fitted on the users
  of both domains (Man et al. 2017, *Cross-domain recommendation: an embedding and mapping
  approach*, EMCDR). Target items are of no use to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import models
from conet_jax.models import emcdr, history, ials, neighbours, recipe
from conet_jax.models.base import Model, Params
from conet_jax.run.experiment import Experiment
from conet_jax.train import ranking
from conet_jax.train.interactions import Interactions

USERS_AT_ONCE = 64
# Ridge of the map from profiles to users, over the mean square of its inputs. From 1e-3 to 1 it
# changed NDCG by less than .004 on 565 users of movies_books whose books had been taken away.
_RIDGE = 1e-2

Lists = dict[str, list[np.ndarray]]  # rows of items by domain, a list a user, maybe empty
Rows = dict[str, np.ndarray]  # of users, by table


class Newcomers(NamedTuple):
    """What a model makes of users given by lists of items.

    Attributes:
      domains: those whose items it can read.
      embed: lists of both domains -> {"user": f32[users, width], ...}, their rows of the tables of
        users; None of a model without such, which reads the lists themselves.
    """

    domains: tuple[str, ...]
    embed: Callable[[Lists], Rows] | None


def of(experiment: Experiment, params: Params) -> Newcomers | None:
    """Returns what the model of a run makes of newcomers; None for nothing.

    Args:
      experiment: the run, for inference.
      params: settled parameters, a row a user or item.
    """
    config, model = experiment.config, experiment.model
    if config.model == "ease":
        return Newcomers(model.domains, None)
    if config.model == "ials" or model.fixed_tables:
        joined = config.joined or "source" in model.domains
        fitted = ("target", "source") if joined else ("target",)
        if not all(f"{domain}_item" in params.tables for domain in fitted):
            return None  # one tower on joined factors keeps none of the source's items
        options = models.options(ials, config)._replace(joined=joined)
        if config.model == "ials":
            solve = solver(params.tables, options, fitted)
            return Newcomers(fitted, lambda lists: {"user": solve(lists)})
        views = recipe.VIEWS if model.pairing == "views" else (fitted,)
        embed = _views(params.tables, options, views, experiment.interactions)
        near, size = neighbours.of_lists(params.tables, fitted), config.neighbours
        return Newcomers(fitted, lambda lists: {"user": embed(lists), **near(lists, size)})
    if config.model == "emcdr":
        solve = solver(params.tables, models.options(emcdr, config).alone, ("source",))
        return Newcomers(
            ("source",),
            lambda lists: {"user": np.asarray(emcdr.mapping(params.dense, solve(lists)))},
        )
    if {"user", "source_item"} <= params.tables.keys():
        embed = mapped(params, experiment.interactions)
        return Newcomers(("source",), lambda lists: {"user": embed(lists)})
    return None


def solver(
    tables: dict[str, jax.Array], options: ials.Options, domains: tuple[str, ...]
) -> Callable[[Lists], np.ndarray]:
    """The best x_u of ``ials`` for lists of some domains, with the items' factors as they are.

    ``(Y^T W Y + alpha sum_{i in u} w_i y_i y_i^T + lambda I)^-1 (1 + alpha) sum_{i in u} w_i y_i``

    Args:
      tables: ``target_item`` and ``source_item``, f32[items, dim or more], factors first.
      options: of the factorisation.
      domains: those that Y and the lists are of.

    Returns:
      Lists -> f32[users, dim], zero for a user without items.
    """
    weights = {"target": 1.0, "source": options.ials_source_weight}
    dim = options.layers[0] // 2
    factors = {d: np.asarray(tables[f"{d}_item"], np.float64)[:, :dim] for d in domains}
    gram = sum(weights[d] * y.T @ y for d, y in factors.items())
    normal = gram + options.ials_regularization * np.eye(dim)

    def solve(lists: Lists) -> np.ndarray:
        out = np.zeros((len(lists[domains[0]]), dim), np.float32)
        for row, *own in zip(out, *(lists[d] for d in domains), strict=True):
            y = np.concatenate([factors[d][items] for d, items in zip(domains, own, strict=True)])
            w = np.repeat([weights[d] for d in domains], [len(items) for items in own])[:, None]
            if len(y):
                system = normal + options.ials_alpha * y.T @ (w * y)
                row[:] = np.linalg.solve(system, (1 + options.ials_alpha) * (w * y).sum(axis=0))
        return out

    return solve


def _views(
    tables: dict[str, jax.Array],
    options: ials.Options,
    views: Sequence[tuple[str, ...]],
    interactions: dict[str, Interactions],
) -> Callable[[Lists], np.ndarray]:
    """Rows of ``out_of_fold``: for each view its factors and, less the mean, log(1 + pairs)."""
    solvers = [solver(tables, options, domains) for domains in views]
    width = options.layers[0] // 2 + 1
    # The mean is found again from the first user's row, count and pairs.
    first = np.asarray(tables["user"][0], np.float64)[width - 1 :: width]
    degrees = {d: int(own.indptr[1] - own.indptr[0]) for d, own in interactions.items()}
    means = [
        np.log1p(sum(degrees[d] for d in view)) - x for view, x in zip(views, first, strict=True)
    ]

    def embed(lists: Lists) -> np.ndarray:
        columns = []
        for solve, view, mean in zip(solvers, views, means, strict=True):
            counts = sum(np.array([len(items) for items in lists[d]]) for d in view)
            columns += [solve(lists), (np.log1p(counts) - mean)[:, None]]
        return np.concatenate(columns, axis=1).astype(np.float32)

    return embed


def mapped(params: Params, interactions: dict[str, Interactions]) -> Callable[[Lists], np.ndarray]:
    """Ridge regression of the users' embeddings on their source histories (EMCDR's linear map).

    Args:
      params: with tables ``user`` and ``source_item``.
      interactions: of the data; the users of both domains are what the map is fitted on.

    Returns:
      Lists -> f32[users, dim]; of the lists the source's are read.
    """
    table, source = params.tables["source_item"], interactions["source"]
    users = np.asarray(params.tables["user"], np.float64)
    both = np.diff(np.asarray(source.indptr)) > 0
    both &= np.diff(np.asarray(interactions["target"].indptr)) > 0
    x = _profiles(source, table, len(users))[both]
    scale = np.maximum(np.sqrt(np.mean(x * x, axis=0)), np.finfo(np.float32).tiny)
    x = x / scale
    normal = x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1])
    to_user = np.linalg.solve(normal, x.T @ users[both]) / scale[:, None]

    def embed(lists: Lists) -> np.ndarray:
        parts = []
        for first in range(0, len(lists["source"]), USERS_AT_ONCE):
            some = lists["source"][first : first + USERS_AT_ONCE]
            parts.append(_profiles(_of_lists(some, source), table, USERS_AT_ONCE + 1)[: len(some)])
        return (np.concatenate(parts) @ to_user).astype(np.float32)

    return embed


def _profiles(source: Interactions, table: jax.Array, users: int) -> np.ndarray:
    """Inputs f64[users, dim + 1] of the map to users: the source history, and 1."""
    means = history.mean_of_all(source.items, source.users, table, users)
    return np.pad(np.asarray(means, np.float64), ((0, 0), (0, 1)), constant_values=1.0)


def project(
    model: Model,
    params: Params,
    interactions: dict[str, Interactions],
    lists: Lists,
    rows: Rows | None,
) -> Any:
    """Projects tables whose users are those of lists.

    Args:
      model: the model.
      params: settled parameters.
      interactions: of the data, by domain.
      lists: of up to ``USERS_AT_ONCE`` users.
      rows: of the tables of users; None of a model without one.

    Returns:
      What ``Model.project`` does.
    """
    own = {domain: _of_lists(lists[domain], interactions[domain]) for domain in interactions}
    if rows is not None:
        padded = {
            name: jnp.asarray(np.pad(own, [(0, USERS_AT_ONCE + 1 - len(own)), (0, 0)]), jnp.float32)
            for name, own in rows.items()
        }
        params = params._replace(tables=params.tables | padded)
    return ranking.project(params, own, model=model)


def _of_lists(lists: list[np.ndarray], like: Interactions) -> Interactions:
    """Lists of a domain's items as those of ``USERS_AT_ONCE`` users.

    One more takes the padding. Shapes are powers of two, so that few programs are compiled.
    """
    degrees = np.zeros(USERS_AT_ONCE + 1, np.int64)
    degrees[: len(lists)] = [len(items) for items in lists]
    longest = 1 << int(degrees.max(initial=1) - 1).bit_length()
    total = int(degrees.sum())
    degrees[-1] = (1 << total.bit_length()) - total
    items = np.concatenate([*lists, np.zeros(degrees[-1], np.int64)])
    arrays = {
        "users": np.repeat(np.arange(len(degrees)), degrees),
        "items": items,
        "indptr": np.concatenate([[0], np.cumsum(degrees)]),
        "skipped": np.zeros(len(items)),  # for drawing negatives alone
    }
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}
    return like.replace(**arrays, max_degree=longest, weights=None, taken=None)

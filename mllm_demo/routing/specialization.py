"""Whether experts divide work by task: what they are chosen for, what is lost without them, both tested by permutation.

Numpy only. What is tested is a table of counts; it knows nothing of models, traces or what the tasks are. Tokens of one
item (a picture with its question) are not independent, so labels are permuted between items, never between tokens.
"""

from typing import NamedTuple

import numpy as np


class Specialization(NamedTuple):
    """information: float64 `[sites]` in bits; p_value: `[sites]`, the share of permutations (with the observed one)
    that reach it; expected: `[sites]`, its mean over permutations, the bias of a finite sample."""

    information: np.ndarray
    p_value: np.ndarray
    expected: np.ndarray


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """`counts [..., tasks, experts]` of tokens → mutual information of task and expert, `[...]`, in bits."""
    joint = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1)
    independent = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log2(joint / independent), 0.0)
    return terms.sum((-2, -1))


def by_task(counts: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """`counts [items, sites, experts]`, `tasks` int `[items]` → `[sites, tasks, experts]`."""
    return np.einsum("it,ise->ste", np.eye(int(tasks.max()) + 1)[tasks], counts)


def permutation_test(counts: np.ndarray, tasks: np.ndarray, permutations: int = 500, seed: int = 0) -> Specialization:
    """`counts [items, sites, experts]`: how many tokens of an item each expert served; `tasks` int `[items]`."""
    rng = np.random.default_rng(seed)
    observed = mutual_information(by_task(counts, tasks))
    shuffled = np.stack(
        [mutual_information(by_task(counts, rng.permutation(tasks))) for _ in range(permutations)]
    )  # (permutations, sites)
    reached = (shuffled >= observed).sum(0)
    return Specialization(observed, (1 + reached) / (1 + permutations), shuffled.mean(0))


def preferred(counts: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """The expert of each site that a task uses most above its share over all tasks: int64 `[tasks, sites]`."""
    table = by_task(counts, tasks)  # (sites, tasks, experts)
    share = table / np.maximum(table.sum(-1, keepdims=True), 1)
    overall = table.sum(1, keepdims=True) / np.maximum(table.sum((1, 2)), 1)[:, None, None]
    return (share - overall).argmax(-1).T


def belonging(damage: np.ndarray, permutations: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """`damage [tasks, tasks]`: how much the second task's loss rises without the experts that the first prefers.

    → how much more a task loses without its own than without another's (mean of the diagonal less that of the rest),
    and the share of permutations of masks among tasks (with the observed one) that reach it. A permutation keeps every
    row and column, so neither a mask that hurts all tasks nor a task that every mask hurts counts for anything.
    """
    tasks = len(damage)
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(np.arange(tasks), (permutations, 1)), axis=1)
    reached = (damage[orders, np.arange(tasks)].sum(1) >= np.trace(damage) - 1e-12).sum()
    rest = (damage.sum() - np.trace(damage)) / (tasks * (tasks - 1))
    return float(np.trace(damage) / tasks - rest), float((1 + reached) / (1 + permutations))

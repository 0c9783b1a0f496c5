"""Mutual information against its definition, and a test that tells division of labour from chance."""

import numpy as np
import pytest

from mllm_demo.routing.specialization import belonging, by_task, mutual_information, permutation_test, preferred

TASKS = np.repeat([0, 1, 2], 20)


def random_counts(rng, items=60, sites=3, experts=4) -> np.ndarray:
    """Items whose tokens prefer an expert at random: strongly dependent within an item, not on its task."""
    return rng.multinomial(50, rng.dirichlet([0.5] * experts, (items, sites)))


def test_mutual_information_is_its_definition():
    counts = np.array([[30, 10], [5, 55]])
    p = counts / 100
    wanted = sum(p[t, e] * np.log2(p[t, e] / (p[t].sum() * p[:, e].sum())) for t in range(2) for e in range(2))
    assert mutual_information(counts) == pytest.approx(wanted)
    assert mutual_information(np.array([[7, 0], [0, 7]])) == pytest.approx(1.0)  # one bit: two tasks, two experts
    assert mutual_information(np.array([[4, 8], [1, 2]])) == pytest.approx(0.0)
    assert mutual_information(np.zeros((2, 2))) == 0


def test_counts_are_added_up_by_task():
    counts = random_counts(np.random.default_rng(0))
    table = by_task(counts, TASKS)
    assert table.shape == (3, 3, 4)
    assert np.array_equal(table[1, 2], counts[TASKS == 2][:, 1].sum(0))


def test_chance_is_not_taken_for_division_of_labour():
    """Tokens of an item go together, so counting tokens as independent would call every router specialised."""
    found = permutation_test(random_counts(np.random.default_rng(1)), TASKS, permutations=200)
    assert (found.p_value > 0.01).all()
    assert found.information == pytest.approx(found.expected, abs=0.05) and (found.expected > 0).all()


def test_division_of_labour_is_found_where_it_is():
    counts = random_counts(np.random.default_rng(2))
    counts[:, 1] = 5
    counts[np.arange(60), 1, TASKS] = 40  # at the second router every task has an expert of its own
    found = permutation_test(counts, TASKS, permutations=200)
    assert found.p_value[1] == pytest.approx(1 / 201) and found.information[1] > 10 * found.expected[1]
    assert preferred(counts, TASKS)[:, 1].tolist() == [0, 1, 2]
    assert preferred(counts, TASKS).shape == (3, 3)


def test_a_mask_that_hurts_everything_and_a_task_that_everything_hurts_belong_to_nothing():
    rng = np.random.default_rng(3)
    damage = rng.normal(0, 0.01, (12, 12))
    damage[4] += 1.0  # the busiest experts
    damage[:, 4] += 1.0  # the most delicate task, the same one
    assert np.diag(damage)[4] > 1.9  # the diagonal alone would call that division of labour
    gap, p_value = belonging(damage)
    assert abs(gap) < 0.02 and p_value > 0.05


def test_masks_that_hurt_their_own_task_are_found():
    damage = np.random.default_rng(4).normal(0.1, 0.05, (12, 12)) + 0.1 * np.eye(12)
    gap, p_value = belonging(damage)
    assert gap == pytest.approx(0.1, abs=0.05) and p_value < 0.01
    assert belonging(-damage)[1] > 0.9


def test_the_test_calls_chance_significant_no_oftener_than_it_says():
    rng = np.random.default_rng(5)
    p_values = np.array([belonging(rng.normal(size=(6, 6)), 400, seed)[1] for seed in range(200)])
    assert abs((p_values <= 0.2).mean() - 0.2) < 0.09  # three standard errors of 200 draws

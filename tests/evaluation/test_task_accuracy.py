"""Exact match on a task's held-out problems, compared with one problem at a time."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_cases import TASK, make_loaded

from looplm_jax.data.tasks import Addition, make_task
from looplm_jax.errors import UserError
from looplm_jax.evaluation._synthetic_tasks import task_accuracy
from looplm_jax.models._looplm import head_matrix


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


def test_a_batch_of_padded_problems_is_scored_as_each_one_by_itself(loaded):
    task = dataclasses.replace(make_task(TASK), validation_items=7)
    measured = task_accuracy(loaded.model, loaded.params, task, loops=4, batch_size=4)
    right = np.zeros((4, 7))
    head = head_matrix(loaded.params, loaded.model.config)
    for index in range(7):
        problem = task.validation_example(index)
        output = loaded.model.apply({"params": loaded.params}, jnp.asarray(problem.tokens[None, :-1]), loops=4)
        predicted = np.asarray(jnp.einsum("tbsd,dv->tbsv", output.hidden, head)).argmax(-1)[:, 0]
        asked = problem.loss_mask[1:]
        right[:, index] = (predicted[:, asked] == problem.tokens[1:][asked]).all(-1)
    np.testing.assert_allclose(measured, right.mean(1))


def test_a_part_of_the_problems_are_the_first_ones(loaded):
    task = dataclasses.replace(make_task(TASK), validation_items=64)
    few = task_accuracy(loaded.model, loaded.params, task, loops=2, items=16, batch_size=16)
    same = task_accuracy(loaded.model, loaded.params, dataclasses.replace(task, validation_items=16), loops=2)
    np.testing.assert_array_equal(few, same)


def test_nothing_held_out_or_another_vocabulary_is_refused(loaded):
    task = make_task(TASK)
    with pytest.raises(UserError, match="the task has no held-out problems"):
        task_accuracy(loaded.model, loaded.params, dataclasses.replace(task, validation_items=0), loops=2)
    with pytest.raises(UserError, match="the task has 13 symbols, more than the model's"):
        task_accuracy(loaded.model, loaded.params, Addition(), loops=2)

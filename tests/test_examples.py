"""The scripts of examples/ run, and show what they say that they show."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT

FOLDER = ROOT / "examples"


def output_of(name):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", done.stdout)]


def test_lasso_in_an_nnx_model_finds_the_inputs_that_matter():
    one, two, kept, shrunk = output_of("nnx_two_tasks.py")
    assert min(one, two) > 0.95 and shrunk < kept / 20


def test_row_adam_in_a_skip_gram_model_is_dense_adam():
    first, last, moved, apart = output_of("plain_jax_word_vectors.py")
    assert last < 0.7 * first and apart < 1e-3 * moved


def test_ranker_gives_a_constant_and_a_random_scorer_what_chance_gives():
    random, auc, constant, half, *_ = output_of("rank_other_scores.py")
    assert constant == 0.1 and half == 0.5
    # Three standard errors of 1,000 users.
    assert abs(random - 0.1) < 0.03 and abs(auc - 0.5) < 0.03


@pytest.mark.slow
def test_training_under_pmap_is_the_product_s_training_on_two_devices():
    first, last, apart = output_of("pmap.py")
    assert last < first and apart <= 1e-12

import itertools

import torch
from scipy import stats

from lib import rng


def test_splitmix64_gives_the_published_numbers_of_seed_1234567():
    state = torch.tensor([1234567]) + torch.arange(1, 4) * -0x61C8864680B583EB
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [n % 2**64 for n in rng.splitmix64(state).tolist()] == published


def test_the_numbers_of_an_image_depend_on_nothing_but_name_seed_index_and_stream():
    like, some = torch.zeros(1), torch.tensor([41, 3, 17])
    u = rng.uniform('pgd', 3, torch.arange(50), (1, 2, 5), like, torch.tensor([[6], [7]]))
    assert torch.equal(rng.uniform('pgd', 3, some, (1, 2, 5), like, 7), u[1, some])


def test_numbers_are_uniform_and_those_of_two_purposes_independent():
    cases = itertools.product(('pgd', 'square'), (0, 1, 1 << 40), (0, 1))  # name, seed, stream
    index, like = torch.arange(4), torch.zeros(1)
    draws = [rng.uniform(name, seed, index, (2500,), like, i) for name, seed, i in cases]
    assert all(stats.kstest(u.flatten(), 'uniform').pvalue > 1e-4 for u in draws)
    correlation = torch.corrcoef(torch.cat(draws)) - torch.eye(4 * len(draws))
    assert correlation.abs().max() < 6 / 50  # six deviations of 1 / sqrt(2500)


def test_seeds_of_words_are_distinct_down_to_their_32_bits():
    words = itertools.product((0, 1, 2, 4096, 2**32 - 1), range(20), range(20))
    assert len({rng.fold_in(*word) % 2**32 for word in words}) == 5 * 20 * 20


def test_directions_have_their_law_and_are_decided_by_their_words():
    vectors = [rng.unit_vector(1000, torch.zeros(1), 1, word) for word in (5, 5, 6)]
    assert torch.equal(vectors[0], vectors[1]) and abs(vectors[0] @ vectors[2]) < 6 / 1000**0.5
    assert stats.kstest(vectors[0] * 1000**0.5, 'norm').pvalue > 1e-4
    assert rng.rademacher(1000, torch.zeros(1), 1).unique(return_counts=True)[1].min() > 400

import re

import numpy as np
import pytest
import torch

import attack
import data
import models
from lib import masking, record
from lib.classifier import correct


@pytest.fixture(scope='module')
def trained(runs):
    """A LeNet, 100 test images and labels, and the verdicts of attacks."""
    model, _ = record.load_model(runs / 'triple/period3.pt')
    _, _, x, y = data.load('mnist5k')
    x, y = x[::10], y[::10]
    perturbed = {
        'clean': x,
        'pgd': attack.pgd(model, x, y, 0.1, 0.02, 5),
        'pgd100': attack.pgd(model, x, y, 0.1, 0.01, 20),
        'square5k': attack.square(model, x, y, 0.1, 300),
    }
    robust = {key: correct(model, x_adv, y).numpy() for key, x_adv in perturbed.items()}
    return model, x, y, robust


def test_a_trained_network_shows_no_sign(trained):
    model, x, y, robust = trained
    assert masking.signs(model, x, y, robust, batch_size=30) == {}
    assert masking.signs(models.Ensemble([model]), x, y, robust) == {}


def noisy(model, x):
    return model(x) + 0.5 * torch.randn(len(x), 1).sign() * model(x).abs().mean()


SIGNS = {
    'zero gradient': (lambda model, x: model(x.round()), 'exactly zero at 100 of 100 images'),
    'random': (noisy, 'differ by up to [1-9.]+: .* fix its seed'),
    'probabilities': (lambda model, x: model(x).softmax(1), 'sum 1, .* return the logits'),
}


@pytest.mark.parametrize('name', SIGNS)
def test_a_model_that_deserves_it_shows_its_sign(trained, name):
    (model, x, y, robust), (wrap, message) = trained, SIGNS[name]
    found = masking.signs(lambda x: wrap(model, x), x, y, robust)
    assert list(found) == [name]
    assert re.search(message, found[name])


def test_verdicts_that_contradict_each_other_are_a_sign(trained):
    model, x, y, robust = trained
    few, most = np.arange(100) < 40, np.arange(100) < 90
    found = masking.signs(model, x, y, {'pgd': few, 'pgd100': most})
    assert list(found) == ['more steps'] and 'leaves 50 of 100 images more' in found['more steps']
    square = robust['pgd'] & robust['pgd100'] & (np.arange(100) % 2 == 0)
    found = masking.signs(model, x, y, robust | {'square5k': square})
    only = (robust['pgd'] & robust['pgd100'] & ~square).sum()
    assert list(found) == ['only square'] and f'breaks {only} of 100' in found['only square']

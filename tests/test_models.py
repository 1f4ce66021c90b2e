import pytest
import torch
from torch import nn

import data
import models

CIFAR10, MNIST = data.DATASETS['cifar10'], data.DATASETS['mnist']


def released_names(name):
    """The keys of the released state_dicts, in order."""
    w, wb = ['weight'], ['weight', 'bias']
    bn = [*wb, 'running_mean', 'running_var', 'num_batches_tracked']
    if name == 'lenet':
        layers = {layer: wb for layer in ('conv1', 'conv2', 'fc1', 'fc2')}
    elif name == 'vgg':
        layers = {}
        for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40):  # then ReLU, maybe pooling
            layers |= {f'feature_extractor.{i}': wb, f'feature_extractor.{i + 1}': bn}
    else:
        layers = {'conv1': w, 'bn1': bn}
        for block in ('1.0', '1.1', '2.0', '2.1', '3.0', '3.1', '4.0', '4.1'):
            parts = {'conv1': w, 'bn1': bn, 'conv2': w, 'bn2': bn}
            if block in ('2.0', '3.0', '4.0'):
                parts |= {'shortcut.0': w, 'shortcut.1': bn}
            layers |= {f'layer{block}.{part}': tensors for part, tensors in parts.items()}
    layers |= {} if name == 'lenet' else {'classifier': wb}
    return [f'{layer}.{tensor}' for layer, tensors in layers.items() for tensor in tensors]


@pytest.mark.parametrize('name, n', [('lenet', 3274634), ('vgg', 3686954), ('resnet18', 2797610)])
def test_parameters_are_those_of_the_released_checkpoints(name, n):
    dataset = MNIST if name == 'lenet' else CIFAR10
    model = models.build(name, dataset, models.MODELS[name].default_width)
    assert sum(p.numel() for p in model.parameters()) == n
    assert list(model.state_dict()) == released_names(name)


@pytest.mark.parametrize('channels, size, n_classes', [(1, 28, 10), (3, 32, 100), (2, 48, 3)])
@pytest.mark.parametrize('name', models.MODELS)
def test_every_model_takes_images_and_classes_of_every_kind(name, channels, size, n_classes):
    model = models.MODELS[name](1, channels, size, n_classes)
    assert model(torch.rand(2, channels, size, size)).shape == (2, n_classes)


def test_lenet_pools_before_relu_to_the_same_end():
    m, x = models.build('lenet', MNIST, 2), torch.rand(5, 1, 28, 28)
    usual = [m.conv1, nn.ReLU(), nn.MaxPool2d(2), m.conv2, nn.ReLU(), nn.MaxPool2d(2)]
    assert torch.equal(m(x), nn.Sequential(*usual, nn.Flatten(), m.fc1, nn.ReLU(), m.fc2)(x))


@pytest.mark.parametrize('k', [1, 3])
def test_an_ensemble_is_the_log_of_the_mean_probability(k):
    members, x = [models.build('lenet', MNIST, 1) for _ in range(k)], torch.rand(4, 1, 28, 28)
    mean = sum(member(x).softmax(1) for member in members) / k
    assert torch.allclose(models.Ensemble(members)(x).exp(), mean, atol=1e-6)


def test_an_ensemble_stays_finite_where_probabilities_underflow():
    logits = torch.tensor([[0.0, 1000.0, -1000.0]])
    assert models.Ensemble([nn.Identity()] * 2)(logits).tolist() == [[-1000, 0, -2000]]

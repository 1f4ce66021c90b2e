import copy
import math

import pytest
import torch
from torch import nn

import models


@pytest.mark.parametrize('name, dataset, width, parameters', [
    ('lenet', 'mnist', 16, 3_274_634), ('vgg', 'cifar10', 8, 3_686_954),
    ('resnet18', 'cifar10', 8, 2_797_610)])
def test_parameter_counts_are_those_of_the_release(name, dataset, width, parameters):
    assert sum(p.numel() for p in models.build(name, dataset, width).parameters()) == parameters


def release_names(name):
    """The keys of the release's state_dicts, from settings of the paper's code, in order."""
    def layer(prefix, *tensors):
        return [f'{prefix}.{tensor}' for tensor in tensors]

    norm = 'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'
    if name == 'lenet':
        return [key for part in ('conv1', 'conv2', 'fc1', 'fc2')
                for key in layer(part, 'weight', 'bias')]
    if name == 'vgg':
        keys, position = [], 0
        for convolutions in (2, 2, 3, 3, 3):
            for _ in range(convolutions):  # conv, BN, ReLU
                keys += layer(f'feature_extractor.{position}', 'weight', 'bias')
                keys += layer(f'feature_extractor.{position + 1}', *norm)
                position += 3
            position += 1  # pooling
        return keys + layer('classifier', 'weight', 'bias')
    keys = ['conv1.weight', *layer('bn1', *norm)]
    for stage in '1234':
        for block in '01':
            prefix = f'layer{stage}.{block}'
            for i in '12':
                keys += [f'{prefix}.conv{i}.weight', *layer(f'{prefix}.bn{i}', *norm)]
            if stage != '1' and block == '0':
                keys += [f'{prefix}.shortcut.0.weight', *layer(f'{prefix}.shortcut.1', *norm)]
    return keys + layer('classifier', 'weight', 'bias')


@pytest.mark.parametrize('name, dataset', [
    ('lenet', 'mnist'), ('vgg', 'cifar10'), ('resnet18', 'cifar10')])
def test_state_dict_names_are_those_of_the_release(name, dataset):
    assert list(models.build(name, dataset, 2).state_dict()) == release_names(name)


def test_layers_have_the_channels_of_the_paper():
    vgg, resnet = models.build('vgg', 'cifar10', 8), models.build('resnet18', 'cifar10', 8)
    assert [m.out_channels for m in vgg.modules() if isinstance(m, nn.Conv2d)] == \
        [32, 32, 64, 64, 128, 128, 128] + 6 * [256]
    first = [getattr(resnet, f'layer{i}')[0].conv1 for i in (1, 2, 3, 4)]
    assert [conv.out_channels for conv in first] == [32, 64, 128, 256]
    assert [conv.stride[0] for conv in first] == [1, 2, 2, 2]


def test_lenet_pools_before_relu_to_the_same_end():
    model, x = models.build('lenet', 'mnist', 2), torch.rand(5, 1, 28, 28)
    usual = nn.Sequential(model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(),
                          nn.MaxPool2d(2), nn.Flatten(), model.fc1, nn.ReLU(), model.fc2)
    assert torch.equal(model(x), usual(x))


@pytest.mark.parametrize('dataset', ['mnist', 'cifar10'])
@pytest.mark.parametrize('name', models.MODELS)
def test_every_model_takes_every_dataset_and_is_recognised_by_its_state_dict(name, dataset):
    channels, size = models.SHAPES[dataset]
    model, x = models.build(name, dataset, 2).eval(), torch.rand(2, channels, size, size)
    assert model(x).shape == (2, 10)
    assert torch.equal(models.recognise(model.state_dict()).eval()(x), model(x))


def test_foreign_parameters_are_not_recognised():
    with pytest.raises(ValueError, match='weight'):
        models.recognise(nn.Linear(3, 3).state_dict())
    state = models.build('lenet', 'mnist', 2).state_dict()
    with pytest.raises(ValueError, match='fc2.bias'):
        models.recognise({key: value for key, value in state.items() if key != 'fc2.bias'})


def test_unknown_names_and_widths_are_named():
    for arguments, found in ((('lenett', 'mnist', 2), 'lenett'), (('lenet', 'svhn', 2), 'svhn'),
                             (('lenet', 'mnist', 0), '0')):
        with pytest.raises(ValueError, match=found):
            models.build(*arguments)


def test_an_ensemble_is_the_log_of_the_mean_probability():
    members, x = [models.build('lenet', 'mnist', 1) for _ in range(3)], torch.rand(4, 1, 28, 28)
    mean = sum(member(x).softmax(1) for member in members) / 3
    assert torch.allclose(models.Ensemble(members)(x).exp(), mean, atol=1e-6)


def test_an_ensemble_of_equals_is_the_model():
    model, x = models.build('lenet', 'mnist', 1), torch.rand(4, 1, 28, 28)
    for k in (1, 3):
        ensemble = models.Ensemble([copy.deepcopy(model) for _ in range(k)])
        assert torch.allclose(ensemble(x), model(x).log_softmax(1), atol=1e-6)


def test_an_ensemble_stays_finite_where_probabilities_underflow():
    class Sure(nn.Module):
        def forward(self, x):
            return x

    logits = torch.tensor([[0., 1000., -1000.]])
    assert models.Ensemble([Sure(), Sure()])(logits).tolist() == [[-1000., 0., -2000.]]
    assert math.isfinite(models.Ensemble([Sure()])(logits).min())


def test_an_empty_ensemble_is_refused():
    with pytest.raises(ValueError, match='none'):
        models.Ensemble([])


def test_tf32_gives_back_what_it_borrowed():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError):
        with models.tf32(True):
            assert torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == 'high'
            with models.tf32(False):
                assert not torch.backends.cudnn.allow_tf32
                assert torch.get_float32_matmul_precision() == 'highest'
            raise KeyError
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)

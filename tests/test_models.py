import copy
import math

import pytest
import torch
import torch.nn.functional as F
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


# The network as its attackers want it

def trained_like(name, width=1):
    """A network in double precision whose BatchNorms are not trivial."""
    torch.manual_seed(0)
    model = models.build(name, {'lenet': 'mnist'}.get(name, 'cifar10'), width).double()
    randomise(model)
    return model


def randomise(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in module.running_var, module.weight.data:
                tensor.uniform_(.5, 2)
            for tensor in module.running_mean, module.bias.data:
                tensor.normal_()


def logits_and_gradient(model, x):
    x = x.clone().requires_grad_()
    with models.frozen(model):
        logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), x)[0]


def same_function(one, other, x):
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(
        logits_and_gradient(one, x), logits_and_gradient(other, x)))


def images_of(model, n=3):
    return torch.rand(n, *[(3, 32, 32), (1, 28, 28)][isinstance(model, models.LeNet)]).double()


@pytest.mark.parametrize('name', models.MODELS)
def test_folding_changes_no_logit_and_no_gradient_and_leaves_no_batch_norm(name):
    model = trained_like(name)
    folded = models.folded(model)
    assert folded is not model and same_function(model, folded, images_of(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_an_ensemble_is_folded_too():
    ensemble = models.Ensemble([trained_like('resnet18'), trained_like('vgg')])
    folded = models.folded(ensemble)
    assert same_function(ensemble, folded, images_of(ensemble))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize('name', models.MODELS)
def test_refolding_takes_over_new_parameters_and_statistics(name):
    model = trained_like(name)
    folded, x = models.folded(model), images_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    randomise(model)
    assert not same_function(model, folded, x)
    folded.refold()
    assert same_function(model, folded, x)


class Odd(nn.Module):
    """BatchNorms that must not be folded: after a sum, after a layer used twice or by two others,
    one without statistics; and one that may."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.shared, self.last = (
            nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4, 4))
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(4) for _ in range(4))
        self.bn5 = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        x = self.bn4(self.first(x))
        x = self.bn1(x + x.sin())
        x = self.bn2(self.twice(torch.relu(self.twice(x))))
        z = self.shared(x)
        return (self.bn5(self.last(self.bn3(z) + z))).mean((2, 3))


def test_only_a_batch_norm_right_behind_its_convolution_is_folded():
    model = Odd().double()
    for bn in model.bn1, model.bn2, model.bn3, model.bn4:
        randomise(bn)
    folded = models.folded(model)
    assert same_function(model, folded, torch.rand(3, 3, 8, 8).double())
    left = [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == ['bn1', 'bn2', 'bn3', 'bn5']


def hooked(model):
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.conv_transpose2d(self.bn(self.conv(x)), self.conv.weight).mean((2, 3))


class Unused(Tied):
    def forward(self, x):
        self.conv(x)
        return self.bn(input=self.conv(input=x)).mean((2, 3))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('std', torch.ones(3, 1, 1))

    def forward(self, x):
        return (x / (2 * self.std)).mean((2, 3))


@pytest.mark.parametrize('build', [
    lambda: hooked(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())),
    Tied, Unused, Scaled,
    lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
                          nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())],
    ids=['hooked', 'tied', 'unused', 'scaled', 'spectral norm'])
def test_unusual_networks_are_the_same_function_too_also_after_changes(build):
    torch.manual_seed(0)
    model = build().double().eval()
    folded, x = models.folded(model), torch.rand(3, 3, 8, 8).double()
    assert same_function(model, folded, x)
    with torch.no_grad():
        for tensor in *model.parameters(), *model.buffers():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    folded.refold()
    assert same_function(model, folded, x)
    assert models.folded(folded) is folded


def test_a_network_that_the_tracer_takes_for_another_is_attacked_as_it_is():
    class Misread(nn.Module):
        def forward(self, x):
            return 4 * x if isinstance(x, torch.Tensor) else x

    model, x = Misread(), torch.rand(2, 3)
    assert models.folded(model, x) is model


def test_a_network_that_cannot_be_traced_is_attacked_as_it_is():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = Branching()
    assert models.folded(model) is model
    model.refold()


@pytest.mark.parametrize('channels, kernel, padding, size', [
    (1, 5, 2, 28), (3, 3, 1, 32), (1, 3, 0, 12), (2, 5, 4, 8), (1, (3, 5), (1, 2), 8),
    (1, 1, 0, 4)])
def test_the_gradient_for_images_is_that_of_the_convolution(channels, kernel, padding, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 6, kernel, padding=padding).double()
    own = models.Convolution(conv)
    own.become(conv.weight.detach(), conv.bias.detach())
    x = torch.rand(5, channels, size, size).double()
    assert own.block and same_function(nn.Sequential(conv, nn.AvgPool2d(2), nn.Flatten()),
                                       nn.Sequential(own, nn.AvgPool2d(2), nn.Flatten()), x)


@pytest.mark.parametrize('conv, size', [
    (nn.Conv2d(1, 4, 3, padding=1), 10), (nn.Conv2d(3, 4, 3, stride=2), 8),
    (nn.Conv2d(1, 4, 3, padding='same'), 8), (nn.Conv2d(1, 4, 3, padding=3), 8),
    (nn.Conv2d(1, 4, 3, padding=1, padding_mode='circular'), 8),
    (nn.Conv2d(2, 4, 3, groups=2), 8), (nn.Conv2d(256, 4, 3, padding=1), 4)])
def test_convolutions_of_any_kind_are_copied_faithfully(conv, size):
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).double()
    randomise(model)
    x = torch.rand(3, conv.in_channels, size, size).double()
    assert same_function(model, models.folded(model), x)


def test_the_bytes_of_a_graph_are_those_of_its_saved_tensors():
    x = torch.rand(10, 1000, requires_grad=True)
    with models.saved_bytes() as saved:
        y = x.exp().sin()  # each keeps a tensor: exp its result, which is what sin keeps
    assert sum(saved.values()) == 4 * x.numel() and y.requires_grad

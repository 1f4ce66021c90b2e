import copy
import itertools

import pytest
import torch
import torchvision
from conftest import printed
from torch import nn

import attack
import data
import models
from lib import classifier, fast

UNUSUAL = {
    'odd': lambda m, x: m.odd(x),
    'constants': lambda m, x: m.plain(x / (2 * m.std) + torch.ones(3, 1, 1)),
    'tied': lambda m, x: torch.conv_transpose2d(m.bn(m.conv(x)), m.conv.weight).mean((2, 3)),
    'branching': lambda m, x: m.plain(x if x.sum() > 0 else -x),
    'misread': lambda m, x: m.plain(4 * x if type(x) is torch.Tensor else x),
    'hooked': lambda m, x: m.plain(x),
}


CLASSIFIERS = (  # torchvision's
    'resnet18 resnet34 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_small '
    'shufflenet_v2_x0_5 mnasnet0_5 squeezenet1_1 regnet_x_400mf regnet_y_400mf efficientnet_b0'
).split()


class Unusual(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.conv, self.bn = name, nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.shared, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.bn4 = nn.BatchNorm2d(4, track_running_stats=False)
        self.register_buffer('std', torch.ones(3, 1, 1))
        if name == 'hooked':
            self.conv.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x):
        return UNUSUAL[self.name](self, x)

    def plain(self, x):
        return self.bn(self.conv(x)).mean((2, 3))

    def odd(self, x):  # of its BatchNorms none but the first may be folded
        x = self.bn(self.conv(x))
        x = self.bn1(x + x.sin())
        x = self.shared(self.bn2(self.twice(self.twice(x))))
        return self.bn4(self.last(self.bn3(x) + x)).mean((2, 3))


@torch.no_grad()
def change(model):  # its parameters and statistics
    for parameter in model.parameters():
        parameter.mul_(0.5 + torch.rand_like(parameter)).add_(0.1 * (parameter.dim() == 1))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.normal_() if name.endswith('mean') else buffer.uniform_(0.5, 2)


def network(name):
    """A network in double precision whose BatchNorms are not trivial, and images for it."""
    torch.manual_seed(0)
    if name == 'ensemble':
        model = models.Ensemble([network('resnet18')[0], network('vgg')[0]])
    elif name == 'synchronised':
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network('resnet18')[0])
    elif name in models.MODELS:
        model = models.build(name, data.DATASETS['mnist' if name == 'lenet' else 'cifar10'], 1)
    elif name in CLASSIFIERS:
        model = torchvision.models.get_model(name, weights=None, num_classes=7)
    else:
        model = Unusual(name)
    change(model.double())
    return model, torch.rand(3, *((1, 28, 28) if name == 'lenet' else (3, 32, 32))).double()


def same_function(one, other, x):
    """Whether logits, and the gradient of a function of them, are the same but for rounding."""
    results = []
    for model in one, other:
        with classifier.frozen(model):
            squares = classifier.loss_and_gradient(model, x, None, lambda z, _: z.square().sum(1))
            results.append(squares)
    return all((a - b).norm() <= 1e-11 * a.norm() for a, b in zip(*results))


OURS = 'lenet', 'vgg', 'resnet18', 'ensemble', 'synchronised'
each = pytest.mark.parametrize('name', [*OURS, *CLASSIFIERS, *UNUSUAL])


@each
def test_a_fold_is_the_same_function_and_stale_after_changes_until_refolded(name):
    model, x = network(name)
    folded = fast.folded(model, x)
    assert same_function(model, folded, x)
    any_bn = any(convolution.original[1] for convolution in folded.convolutions)
    assert any_bn or name in ('lenet', 'squeezenet1_1', *UNUSUAL)
    change(model)
    assert same_function(model, folded, x) != bool(folded.convolutions)
    folded.refold()
    assert same_function(model, folded, x)


def test_a_batch_norm_is_folded_right_behind_a_convolution_of_its_own_in_a_network_well_traced():
    left = {'odd': ['bn1', 'bn2', 'bn3', 'bn4'], 'hooked': ['bn']}
    left |= dict.fromkeys(['branching', 'misread'], ['bn', 'bn1', 'bn2', 'bn3', 'bn4'])
    for name in *OURS, 'constants', *left:
        modules = fast.folded(*network(name)).network.named_modules()
        bns = [path for path, m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert bns == left.get(name, [])


@each
def test_folding_and_attacking_leave_no_trace(name):
    def held():  # by identity, hooks included
        values = [value for module in model.modules() for value in vars(module).values()]
        return [list(map(id, v.values())) if isinstance(v, dict) else id(v) for v in values]

    model, x = network(name)
    before, values, random = held(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fast.Adversary(attack.pgd_loop, model, 2, x)(x, torch.arange(3), 0.1, 0.05)
    assert held() == before and torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, model.state_dict().values(), values.values()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_convolutions_of_every_kind_keep_their_function_and_gradient():
    convs = [nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(3, 6, 3, padding=1)]
    convs += [nn.Conv2d(2, 6, (3, 5), 1, (1, 2)), nn.Conv2d(2, 6, (3, 5), 1, (1, 4))]
    convs += [nn.Conv2d(256, 6, 3, bias=False), nn.Conv2d(3, 6, 3, 1, 1, padding_mode='reflect')]
    others = {'stride': 2}, {'padding': 'same'}, {'padding': 3}, {'groups': 3}, {'dilation': 2}
    convs += [nn.Conv2d(3, 6, 3, **options) for options in others]
    for conv, size in itertools.product(convs, (8, 10)):
        model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()).double()
        change(model)
        x = torch.rand(3, conv.in_channels, size, size).double()
        folded = fast.folded(model, x)
        assert same_function(model, folded, x), conv
        has_fast_gradient = bool(folded.convolutions[0].block)
        assert has_fast_gradient == (conv in convs[:3])


def test_tf32_gives_back_what_it_borrowed():
    def state():
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = state()
    for allowed, precision in (True, 'high'), (False, 'highest'):
        with pytest.raises(KeyError), fast.tf32(allowed):
            assert state() == (allowed, precision)
            raise KeyError
    assert state() == before


def test_only_float32_on_cuda_is_nchw():
    for device, precision in itertools.product(('cpu', 'cuda:1'), ('fp32', 'tf32', 'bf16')):
        nchw = fast.memory_format(device, precision) == torch.contiguous_format
        assert nchw == (device == 'cuda:1' and precision == 'fp32')


@pytest.mark.parametrize('device', ['cpu', 'cuda'][: 1 + torch.cuda.is_available()])
@pytest.mark.parametrize('name', ['lenet', 'resnet18'])
def test_an_adversary_is_pgd_whatever_changes(name, device):
    (model, x), y = (part.to(device) for part in network(name)), torch.arange(3, device=device)
    adversary = fast.Adversary(attack.pgd_loop, model, 3, x)
    for seed, (eps, start, n) in enumerate([(0.1, None, 3), (0.05, 0.05, 3), (0.1, None, 2)]):
        expected = attack.pgd(model, x[:n], y[:n], eps, eps / 4, 3, start=start, seed=seed)
        found = adversary(x[:n], y[:n], eps, eps / 4, start=start, seed=seed)
        assert torch.allclose(found, expected, atol=1e-9) and model.training
        change(model)


def test_a_loop_is_captured_once_for_each_shape_and_replayed_for_each_batch():
    def captured(run):  # as a CUDA graph would: run() fixes which tensors it reads and writes
        captures.append(run())
        return lambda: replays.append(run())

    (model, x), y, captures, replays, results = network('lenet'), torch.arange(3), [], [], []
    adversary = fast.Adversary(attack.pgd_loop, model, 2, x, capture=captured)
    for n, eps in (3, 0.1), (3, 0.2), (2, 0.2), (3, 0.05), (2, 0.3):
        found = adversary(x[:n], y[:n], eps, eps / 4, seed=n)
        results.append((found, attack.pgd(model, x[:n], y[:n], eps, eps / 4, 2, seed=n)))
    assert len(captures) == 2 and len(replays) == 5
    assert all(itertools.starmap(torch.allclose, results))  # none was overwritten by the next


def test_without_a_graph_the_loop_runs_as_it_is_and_says_so():
    def captured(run):
        raise RuntimeError('CUDA error: operation not permitted when stream is capturing\nCompile')

    (model, x), y = network('lenet'), torch.arange(3)
    adversary = fast.Adversary(attack.pgd_loop, model, 2, x, capture=captured)
    with pytest.warns(UserWarning, match='no CUDA graph.*: CUDA error: .* is capturing$'):
        found = adversary(x, y, 0.1, 0.05)
    assert torch.allclose(found, attack.pgd(model, x, y, 0.1, 0.05, 2))


def test_in_bf16_no_step_of_an_attack_casts_weights():
    model, x = models.build('resnet18', data.DATASETS['cifar10'], 2), torch.rand(3, 3, 32, 32)
    results, casts, y = [], [], torch.arange(3)
    for dtype, n_iter in itertools.product((torch.float32, torch.bfloat16), (1, 3)):
        adversary = fast.Adversary(attack.pgd_loop, model, n_iter, x, dtype=dtype)
        autocast = torch.autocast('cpu', torch.bfloat16, cache_enabled=False)
        with autocast, torch.profiler.profile() as profile:
            results.append(adversary(x, y, 0.1, 0.05))
        casts.append(sum(event.name == 'aten::_to_copy' for event in profile.events()))
    assert torch.equal(results[1], results[3])
    assert (casts[1] - casts[0]) - (casts[3] - casts[2]) >= 2 * 20  # of 20 weights in 2 more steps


def test_nan_logits_show_in_the_total_and_the_trial_of_a_capture_does_not(monkeypatch):
    monkeypatch.setattr(torch, 'empty_like', lambda x: torch.full_like(x, torch.nan))
    (model, x), y = network('constants'), torch.arange(3)
    adversary = fast.Adversary(attack.pgd_loop, model, 2, x, capture=lambda run: run() or run)
    adversary(x, y, 0.1, 0.05)
    assert not adversary.nan
    for variance in -1, 1:  # the check comes many batches later
        model.bn.running_var.fill_(variance)
        adversary(x, y, 0.1, 0.05)
    assert adversary.nan


def test_a_step_of_training_resnet18_takes_less_than_8_mib_an_image():
    grown = printed("""
import torch
import attack, data
from lib import fast
import models
torch.set_num_threads(1)
model, before = models.build('resnet18', data.DATASETS['cifar10'], 8), peak()
x, y = torch.rand(64, 3, 32, 32), torch.arange(64) % 10
x = fast.Adversary(attack.pgd_loop, model, 2, x[:2])(x, y, 8 / 255, 2 / 255)
torch.nn.functional.cross_entropy(model(x), y).backward()
print((peak() - before) / 64)
""")
    assert 2**20 < grown < 2**23

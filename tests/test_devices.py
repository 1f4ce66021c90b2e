"""What a GPU would find wrong, without one: CPU tensors are labelled as cuda's or the host's, and
an operation that mixes both, or makes the host wait, is seen."""

import collections
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attack
import data
import hessian
import models
import train
from lib import classifier, fast

WAITS = '_local_scalar_dense.default', 'nonzero.default', 'masked_select.default'
SHORT = {'n_iter': 3, 'n_restarts': 2, 'n_targets': 2, 'n_queries': 21}


def tensors_in(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Labels(TorchDispatchMode):
    """Knows which storages are on cuda; None is what a backward pass makes, and fits both."""

    on_cuda, made, alive, waits = {}, None, [], collections.Counter()

    def of(self, tensor):
        return self.on_cuda.get(tensor.untyped_storage()._cdata)

    def label(self, tensor, on_cuda):
        self.alive.append(StorageWeakRef(tensor.untyped_storage()))  # no other gets its address
        self.on_cuda[tensor.untyped_storage()._cdata] = on_cuda
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, tensors = func.__name__, tensors_in(args, kwargs)
        found = {self.of(tensor) for tensor in tensors} - {None}
        made = max(found, default=None) if tensors and self.made is None else self.made
        self.waits[name] += True in found and name in WAITS
        if name.startswith('index') and True in found:  # whose indices may be on the host
            indices = tensors_in(args[1])
            self.waits[name] += any(not self.of(i) or i.dtype == torch.bool for i in indices)
            tensors = [args[0], *args[2:3]]
        if name == 'copy_.default':
            made = self.of(args[0])
            self.waits[name] += len(found) - 1  # a copy from one to the other
        elif True in found and any(
            (t.dim() or t is args[0]) and self.of(t) is False for t in tensors
        ):
            raise RuntimeError(f'{name} mixes devices')
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result) if not name.startswith('set_') else ():
            self.label(tensor, made)
        return result


class Devices(TorchFunctionMode):
    """Makes .device, .to(...) and device=... follow the labels."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, '__name__', '')
        own = [LABELS.of(tensor) for tensor in tensors_in(args, kwargs)]
        if func == torch.Tensor.is_cuda.__get__:
            return bool(own[0])
        if func == torch.Tensor.device.__get__:
            return torch.device('cuda:0' if own[0] else 'cpu')
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            on_cuda, dtype = own[-1] and name != 'cpu', kwargs.get('dtype', args[0].dtype)
            for option in args[1:]:
                if isinstance(option, torch.Tensor):
                    dtype = option.dtype
                elif isinstance(option, torch.dtype):
                    dtype = option
                elif isinstance(option, (str, torch.device)):
                    on_cuda = torch.device(option).type == 'cuda'
            LABELS.waits['to'] += (moves := on_cuda is not own[0])
            return LABELS.label(torch.Tensor.to(args[0], dtype, copy=moves), on_cuda)
        from_host = name in ('tensor', 'new_tensor')
        made = None if own else False
        if name in ('new_tensor', '__deepcopy__'):
            made = own[0]
        if (device := kwargs.pop('device', None)) is not None:
            made = torch.device(device).type == 'cuda'
        LABELS.waits[name] += from_host and bool(made)
        with mock.patch.object(LABELS, 'made', made):
            result = func(*args, **kwargs)
        return LABELS.label(result, made) if from_host or name == '__deepcopy__' else result


LABELS = Labels()


@pytest.fixture
def scene():
    """A network, images and labels of a cuda device that is there for the test."""
    with LABELS, Devices():
        model = models.build('resnet18', data.DATASETS['cifar10'], 2).to('cuda')
        x = torch.rand(6, 3, 32, 32, device='cuda')
        yield model, x, classifier.predict(model, x)


def test_a_mixture_and_a_wait_are_seen(scene):
    _, x, _ = scene
    with pytest.raises(RuntimeError, match='mixes devices'):
        x + torch.ones(6, 3, 32, 32)
    LABELS.waits.clear()
    assert x.sum().item() > 0 and +LABELS.waits


def test_an_adversary_waits_for_nothing(scene, monkeypatch):
    monkeypatch.setattr(fast, 'captured', lambda run: [run() for _ in range(3)] and run)
    model, x, y = scene
    adversary = fast.Adversary(attack.pgd_loop, model, 2, x[:2])
    adversary(x, y, 0.1, 0.05)
    LABELS.waits.clear()
    assert adversary(x, y, 0.1, 0.05, seed=1).is_cuda and not +LABELS.waits


@pytest.mark.parametrize('key', [*attack.ATTACKS, *attack.STANDARD])
def test_no_attack_mixes_devices(scene, key):
    run = (attack.ATTACKS | attack.STANDARD)[key]
    options = {name: SHORT[name] for name in getattr(run, 'keywords', ['n_iter']) if name in SHORT}
    options |= {'step_size': 0.05} if key in ('pgd', 'pgd100') else {}
    assert run(*scene, eps=0.01, batch_size=4, **options).is_cuda


def test_training_mixes_no_devices(scene):
    model, x, y = scene
    c = train.config_of('--dataset cifar10 --periods 1 --batch-size 4 --n-iter 2 --trace 1'.split())
    c, theta_0 = mock.Mock(**c), [theta.detach().clone() for theta in model.parameters()]
    adversary, optimizer = (
        fast.Adversary(attack.pgd_loop, model, 2, x, capture=lambda f: f),
        torch.optim.SGD,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    row, _ = train.train_epoch(model, adversary, optimizer, x, y, c, 0, theta_0, mock.Mock())
    assert row['loss'] > 0


@pytest.mark.parametrize('solver', hessian.SOLVERS)
def test_no_analysis_mixes_devices(scene, solver):
    model, x, y = scene
    H, dim = hessian.Hessian(model, x, y, 4), sum(p.numel() for p in model.parameters())
    assert hessian.SOLVERS[solver](H, dim, 2, max_products=6, like=x.new_zeros(()))[1].is_cuda

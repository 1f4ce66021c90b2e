"""The paper's three networks and their ensemble.

Inputs are images in [0, 1], (N, C, H, W); outputs are logits, (N, 10). Names in the state_dicts and
parameter counts are those of the paper's released checkpoints, which therefore load as they are.
"""
import contextlib
import math
import os

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

SHAPES = {'mnist': (1, 28), 'mnist5k': (1, 28), 'cifar10': (3, 32)}  # channels, height = width


class LeNet(nn.Module):
    """Two 5x5 convolutions and two linear layers; 3,274,634 parameters at width 16 on MNIST."""

    def __init__(self, width=16, channels=1, size=28):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * width, 5, padding=2)
        self.conv2 = nn.Conv2d(2 * width, 4 * width, 5, padding=2)
        self.fc1 = nn.Linear(4 * width * (size // 4) ** 2, 64 * width)
        self.fc2 = nn.Linear(64 * width, 10)

    def forward(self, x):
        # pooling first: it commutes with ReLU, on 4 x fewer values
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class VGG(nn.Module):
    """VGG16 with BatchNorm; 3,686,954 parameters at width 8 on CIFAR10."""

    PLAN = (4, 4, 'M', 8, 8, 'M', 16, 16, 16, 'M', 32, 32, 32, 'M', 32, 32, 32, 'M')

    def __init__(self, width=8, channels=3, size=32):
        super().__init__()
        layers = []
        for multiple in self.PLAN:
            if multiple == 'M':
                # before the ReLU; ceil: five poolings leave 1 x 1 of 28 x 28, too
                layers.insert(-1, nn.MaxPool2d(2, ceil_mode=True))
            else:
                out = multiple * width
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.feature_extractor = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x):
        return self.classifier(self.feature_extractor(x).flatten(1))


class Block(nn.Module):
    """ResNet's basic block: two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False),
                                          nn.BatchNorm2d(out))

    def forward(self, x):
        residual = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        return F.relu_(residual.add_(self.shortcut(x)))


class ResNet18(nn.Module):
    """ResNet18 for small images; 2,797,610 parameters at width 8 (half the usual) on CIFAR10."""

    def __init__(self, width=8, channels=3, size=32):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * width)
        widths = [4 * width, 4 * width, 8 * width, 16 * width, 32 * width]
        for i, stride in enumerate((1, 2, 2, 2)):
            blocks = Block(widths[i], widths[i + 1], stride), Block(widths[i + 1], widths[i + 1], 1)
            setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x):
        x = F.relu_(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(x.mean((2, 3)))


class Ensemble(nn.Module):
    """Log of the mean of members' probabilities, (N, 10): logsumexp_k(log_softmax(z_k)) - log K.

    Used as logits it gives the ensemble's cross-entropy, margin and DLR, so attacks need no second
    code path.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise ValueError('an ensemble needs at least one member, got none')

    def forward(self, x):
        log_probabilities = torch.stack([F.log_softmax(member(x), 1) for member in self.members])
        return log_probabilities.logsumexp(0) - math.log(len(self.members))


MODELS = {'lenet': LeNet, 'vgg': VGG, 'resnet18': ResNet18}


def build(name, dataset, width):
    """A freshly initialised network, `name` in MODELS, for the images of `dataset` in SHAPES."""
    if name not in MODELS:
        raise ValueError(f'model {name!r} is unknown; choose from {", ".join(MODELS)}')
    if dataset not in SHAPES:
        raise ValueError(f'dataset {dataset!r} is unknown; choose from {", ".join(SHAPES)}')
    if width < 1:
        raise ValueError(f'width must be at least 1, got {width}')
    return MODELS[name](width, *SHAPES[dataset])


def recognise(state_dict):
    """The network of a plain state_dict, with its parameters: names and shapes say which one.

    Raises ValueError where they fit none of MODELS.
    """
    def shape(key):
        return getattr(state_dict.get(key), 'shape', (0, 0, 0, 0))

    try:
        if 'fc1.weight' in state_dict:
            out, channels = shape('conv1.weight')[:2]
            model = LeNet(out // 2, channels, 4 * math.isqrt(shape('fc1.weight')[1] // (2 * out)))
        elif 'feature_extractor.0.weight' in state_dict:
            out, channels = shape('feature_extractor.0.weight')[:2]
            model = VGG(out // 4, channels)
        elif 'layer1.0.conv1.weight' in state_dict:
            out, channels = shape('conv1.weight')[:2]
            model = ResNet18(out // 4, channels)
        else:
            raise ValueError(f'these are the parameters of none of {", ".join(MODELS)}, but '
                             f'{", ".join(list(state_dict)[:3]) or "nothing"}, ...')
        model.load_state_dict(state_dict)
    except (RuntimeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f'these parameters fit none of {", ".join(MODELS)}: {error}') from None
    return model


def dataset_of(model):
    """The dataset whose images `model` takes, as far as its first layer tells: mnist or cifar10.

    ValueError where it takes neither.
    """
    channels = next(model.parameters()).shape[1]
    for name in 'mnist', 'cifar10':
        if SHAPES[name][0] == channels and not (
                isinstance(model, LeNet) and model.fc1.in_features != (
                    model.conv2.out_channels * (SHAPES[name][1] // 4) ** 2)):
            return name
    raise ValueError(f'this network takes images of {channels} channels, unlike any dataset here')


def norm(*tensors):
    """Their Euclidean norm as one vector; torch's own is off by 2e-4 on millions of floats."""
    return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum().sqrt()


@contextlib.contextmanager
def frozen(model):
    """Inside, `model` is in eval mode, its parameters need no gradient; after, all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


def folded(model, x=None):
    """`model` as its attackers want it: the same function of x in eval mode, at less cost.

    Each BatchNorm is folded into the convolution before it, which is exact but for rounding, and
    convolutions are laid out as is fastest (`Convolution`); all else is shared with `model`. When
    its parameters or statistics change, refold() of what is returned takes over the new ones. A
    model that torch.fx cannot follow, or of which it makes something else, as images x show, is
    returned as it is, its refold() doing nothing.
    """
    if hasattr(model, 'refold'):
        model.refold()
        return model
    tracer = torch.fx.Tracer()
    tracer.proxy_buffer_attributes = True  # else what is computed of buffers alone is a constant
    try:
        with frozen(model):
            network = torch.fx.GraphModule(model, tracer.trace(model))
    except Exception:  # a tracer fails in as many ways as there are models
        return unfolded(model)
    modules = {node: model.get_submodule(node.target) for node in network.graph.nodes
               if node.op == 'call_module'}
    plain = {node: list(modules.values()).count(module) == 1 and not (
        module._forward_hooks or module._forward_pre_hooks) for node, module in modules.items()}
    for node in network.graph.nodes:
        if node.op == 'get_attr':  # a parameter that is used outside of its module, too
            plain = {call: ok and not node.target.startswith(f'{call.target}.')
                     for call, ok in plain.items()}
    pairs = []
    for node, conv in modules.items():
        if type(conv) is nn.Conv2d and plain[node]:
            after, bn = next(iter(node.users), None), None
            if len(node.users) == 1 and plain.get(after) and (
                    type(modules[after]) is nn.BatchNorm2d and modules[after].track_running_stats):
                bn = modules[after]
                after.replace_all_uses_with(node)
                network.graph.erase_node(after)
            pairs.append((Convolution(conv), conv, bn))
            network.set_submodule(node.target, pairs[-1][0])
    network.recompile()
    network.delete_all_unused_submodules()

    @torch.no_grad()
    def refold():
        for own, conv, bn in pairs:
            weight, bias = conv.weight, conv.bias
            if bn:
                weight, bias = fuse_conv_bn_weights(
                    weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
            own.become(weight, bias)

    network.refold = refold
    refold()
    if x is not None:
        with frozen(model), frozen(network), torch.no_grad():
            expected, found = model(x).double(), network(x).double()
        if not (found - expected).norm() <= 1e-3 * expected.norm():
            return unfolded(model)
    return network


def unfolded(model):
    """The model itself, with a refold() that does nothing."""
    model.refold = lambda: None
    return model


class Convolution(nn.Conv2d):
    """A copy of a convolution, with a bias, without gradients for parameters; laid out to be fast.

    That is channels_last, but on a CPU for 256 channels and more, whose maps are small, not so. The
    gradient for images of up to 3 channels is `ImageGradient` there.
    """

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                         conv.padding, conv.dilation, conv.groups, True, conv.padding_mode,
                         conv.weight.device, conv.weight.dtype)
        self.requires_grad_(False)
        self.bias.zero_()
        on_cpu = conv.weight.device.type == 'cpu'
        self.is_small, self.block = on_cpu and conv.in_channels >= 256, 0
        if on_cpu and conv.in_channels <= 3 and conv.groups == 1 and (
                conv.stride == conv.dilation == (1, 1) and conv.padding_mode == 'zeros'
                and not isinstance(conv.padding, str)
                and all(p < k for p, k in zip(conv.padding, conv.kernel_size))):
            self.block = 4 if conv.in_channels == 1 else 2
        if not self.is_small:
            self.to(memory_format=torch.channels_last)

    def become(self, weight, bias):
        """Takes over these parameters."""
        self.weight.copy_(weight)
        if bias is not None:  # else it is and stays 0
            self.bias.copy_(bias)
        if self.block:
            self.kernel = ImageGradient.kernel(self.weight, self.block)

    def forward(self, input):
        x = input
        if self.block and x.shape[2] % self.block == x.shape[3] % self.block == 0:
            return ImageGradient.apply(x, self.weight, self.bias, self.padding, self.kernel)
        return super().forward(x.contiguous() if self.is_small else x)


class ImageGradient(torch.autograd.Function):
    """conv2d(x, weight, bias, padding=padding), with a gradient for x only, fast on a CPU.

    The transposed convolution has but one or three output channels. Here the pixels of a block of
    b x b are its output channels, so that it is a convolution of stride b: 5 to 9 times as fast as
    oneDNN's own for one channel, 1.5 times for three.
    """

    @staticmethod
    def kernel(weight, b):
        """The kernel of the gradient by blocks, (C b b, out, b + k - 1, b + k' - 1)."""
        out, channels, *k = weight.shape
        kernel = weight.new_zeros(channels, b, b, out, b + k[0] - 1, b + k[1] - 1)
        for i in range(b):
            for j in range(b):
                kernel[:, i, j, :, i:i + k[0], j:j + k[1]] = weight.flip(2, 3).transpose(0, 1)
        return kernel.flatten(0, 2).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def forward(ctx, x, weight, bias, padding, kernel):
        ctx.save_for_backward(kernel)
        ctx.block = round((len(kernel) / x.shape[1]) ** .5)
        ctx.padding = [size - 1 - p for size, p in zip(weight.shape[2:], padding)]
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        kernel, = ctx.saved_tensors
        blocks = F.conv2d(gradient, kernel.to(gradient), stride=ctx.block, padding=ctx.padding)
        return F.pixel_shuffle(blocks, ctx.block), None, None, None, None


@contextlib.contextmanager
def saved_bytes():
    """Yields a dict whose values sum up to the bytes that graphs made inside keep in tensors."""
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def memory(device):
    """Bytes of memory of `device` that are free, and all of them."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)
    return [os.sysconf('SC_PAGE_SIZE') * (os.sysconf(name) if name in os.sysconf_names else 2 ** 20)
            for name in ('SC_AVPHYS_PAGES', 'SC_PHYS_PAGES')]


def fitting(size, device):
    """How many graphs of `size` bytes fill an eighth of the memory of `device`, at least one.

    All of the memory, not what is free: a command given again computes in the same batches.
    """
    return max(1, int(memory(device)[1] // (8 * size + 1)))


@contextlib.contextmanager
def tf32(allowed):
    """Inside, float32 products may or may not be rounded to TF32 on tensor cores (cuda only)."""
    saved = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('high' if allowed else 'highest')
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved[0])
        torch.backends.cudnn.allow_tf32 = saved[1]

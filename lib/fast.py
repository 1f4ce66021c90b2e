"""Networks and PGD at less cost: folded BatchNorm, memory layouts, the PGD loop as a CUDA graph.

Only scripts use `folded` and `Adversary`; models.py and attack.py do not depend on them.
"""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from attack import pgd_loop
from lib import distributed
from lib.classifier import flag, frozen
from lib.rng import uniform


def memory_format(device, precision='fp32'):
    """The fastest layout of images and networks: NCHW for float32 on cuda, else channels_last."""
    on_cuda = torch.device(device).type == 'cuda'
    return torch.contiguous_format if on_cuda and precision == 'fp32' else torch.channels_last


def folded(model, x):
    """An eval-only copy of `model` with each BatchNorm folded into the preceding convolution.

    It computes the same function but for rounding, at less cost, and shares all other modules with
    `model`, which stays as it was. refold() updates it after the parameters or statistics of
    `model` have changed. A model that torch.fx cannot trace, or whose copy differs on a few images
    x, (N, C, H, W), is wrapped as it is.
    """
    try:
        with frozen(model), torch.no_grad(), tf32(False):
            fast = Folded(*fold(model))
            expected, found = model(x).double(), fast(x).double()
        if (found - expected).norm() <= 1e-3 * expected.norm():
            return fast
    except Exception:  # tracing fails in many ways
        pass
    return Folded(model, [])


class Folded(nn.Module):
    """What `folded` returns: `network`, and the `pairs` by which refold() updates it."""

    def __init__(self, network, pairs):
        super().__init__()
        self.network, self.pairs = network, pairs
        self.refold()

    def forward(self, x):
        return self.network(x)

    @torch.no_grad()
    def refold(self):
        for convolution, conv, bn in self.pairs:
            weight, bias = conv.weight, conv.bias
            if bn:
                statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
                weight, bias = fuse_conv_bn_weights(weight, bias, *statistics)
            convolution.set_weights(weight, bias)


def fold(model):
    """The traced network of `model`, and (ours, original, BatchNorm or None) per convolution."""
    tracer = torch.fx.Tracer()
    tracer.proxy_buffer_attributes = True  # else results of buffers alone become constants
    root = copy.copy(model)  # the tracer leaves attributes on its root
    network = torch.fx.GraphModule(root, tracer.trace(root))
    nodes = [node for node in network.graph.nodes if node.op == 'call_module']
    modules = [network.get_submodule(node.target) for node in nodes]
    calls = {  # of modules that can be replaced: those called once and without hooks
        node: module
        for node, module in zip(nodes, modules)
        if modules.count(module) == 1 and not (module._forward_hooks or module._forward_pre_hooks)
    }
    pairs = []
    for node, conv in calls.items():
        if type(conv) is not nn.Conv2d:
            continue
        after, bn = next(iter(node.users), None), None
        if len(node.users) == 1 and type(calls.get(after)) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            if calls[after].track_running_stats:
                bn = calls[after]
                after.replace_all_uses_with(node)
                network.graph.erase_node(after)
        pairs.append((Convolution(conv), conv, bn))
        network.set_submodule(node.target, pairs[-1][0])
    network.recompile()
    network.delete_all_unused_submodules()
    return network, pairs


class Convolution(nn.Module):
    """A copy of a convolution with a bias and without gradients for parameters.

    On a CPU it has the fastest layout: channels_last, but contiguous from 256 channels on, where
    feature maps are small. With up to 3 channels its gradient is that of `ImageGradient`.
    """

    def __init__(self, conv):
        super().__init__()
        self.conv = copy.deepcopy(conv)
        if conv.bias is None:
            self.conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        self.conv.requires_grad_(False)
        on_cpu = conv.weight.device.type == 'cpu'
        self.use_contiguous = on_cpu and conv.in_channels >= 256
        self.block = 0
        usual = conv.stride == conv.dilation == (1, 1) and conv.groups == 1
        same_size = conv.padding == tuple(k // 2 for k in conv.kernel_size)
        if on_cpu and usual and same_size and conv.padding_mode == 'zeros':
            self.block = {1: 4, 2: 2, 3: 2}.get(conv.in_channels, 0)
        if on_cpu and not self.use_contiguous:
            self.conv.to(memory_format=torch.channels_last)

    def set_weights(self, weight, bias):
        self.conv.weight.copy_(weight)
        if bias is not None:  # else it is and stays 0
            self.conv.bias.copy_(bias)
        if self.block:
            self.kernel = ImageGradient.kernel(self.conv.weight, self.block)

    def forward(self, x):
        conv = self.conv
        if self.block and x.shape[2] % self.block == x.shape[3] % self.block == 0:
            return ImageGradient.apply(x, conv.weight, conv.bias, conv.padding, self.kernel)
        return conv(x.contiguous() if self.use_contiguous else x)


class ImageGradient(torch.autograd.Function):
    """conv2d(x, weight, bias, padding=padding) with a gradient for x alone, which is fast on a CPU.

    The gradient is a transposed convolution with as few output channels as x has. Here it is a
    convolution of stride b, whose output channels are the pixels of blocks of b x b: 5 to 9 times
    as fast as oneDNN's for one channel, 1.5 times for three.
    """

    @staticmethod
    def kernel(weight, b):
        """The kernel of the gradient by blocks, (C b b, out, b + k - 1, b + k' - 1)."""
        out, channels, *k = weight.shape
        kernel = weight.new_zeros(channels, b, b, out, b + k[0] - 1, b + k[1] - 1)
        for i in range(b):
            for j in range(b):
                kernel[:, i, j, :, i : i + k[0], j : j + k[1]] = weight.flip(2, 3).transpose(0, 1)
        return kernel.flatten(0, 2).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def forward(ctx, x, weight, bias, padding, kernel):
        ctx.save_for_backward(kernel)
        ctx.block = round((len(kernel) / x.shape[1]) ** 0.5)
        ctx.padding = [size - 1 - p for size, p in zip(weight.shape[2:], padding)]
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (kernel,) = ctx.saved_tensors
        blocks = F.conv2d(gradient, kernel.to(gradient), stride=ctx.block, padding=ctx.padding)
        return F.pixel_shuffle(blocks, ctx.block), None, None, None, None


class Adversary:
    """The attacker of a model in training: `pgd`, set up once for all batches.

    adversary(x, y, eps, step_size, start=..., seed=...) is pgd(model, x, y, eps, step_size, n_iter,
    ...) but for rounding: it attacks the `folded` network, with the parameters at the time of the
    call. On cuda the whole loop, folding included, is captured as a CUDA graph at the first batch
    of each shape; budgets are tensors in it, so that schedules can change them. Nothing waits for
    the device: values are not checked, but `nan` tells if a loss or gradient has been nan.

    `compiled` is applied to the network (torch.compile), `capture` to the loop, a function without
    arguments; by default this is `fast.captured` on cuda and nothing elsewhere. Where it fails, the
    loop runs as it is. For autocast to `dtype` the weights of convolutions are cast beforehand.
    """

    def __init__(self, model, n_iter, x, *, compiled=None, capture=None, dtype=torch.float32):
        self.model, self.n_iter, self.capture = model, n_iter, capture
        self.loops = {}  # shape of x -> what loop(x, y) returns
        self.nan = flag(x)
        self.folded = folded(model, x)
        if dtype != torch.float32:
            for convolution, *_ in self.folded.pairs:
                convolution.conv.to(dtype)
        self.network = compiled(self.folded) if compiled else self.folded

    def __call__(self, x, y, eps, step_size, *, start=None, seed=0):
        if x.shape not in self.loops:
            self.loops[x.shape] = self.loop(x, y)
        s, replay = self.loops[x.shape]
        s.x.copy_(x)
        s.y.copy_(y)
        s.noise.copy_(uniform('pgd', seed, s.index, x.shape[1:], x))
        s.eps.fill_(eps)
        s.step_size.fill_(step_size)
        s.start.fill_(step_size if start is None else start)
        replay()
        return s.x_adv.clone()

    def loop(self, x, y):
        """Tensors for arguments and result at one shape of batches, and a function that attacks."""
        s = SimpleNamespace(x=x.clone(), y=y.clone(), x_adv=torch.empty_like(x))
        s.noise = torch.zeros_like(x)
        places = torch.arange(len(x), device=x.device)
        s.index = distributed.RANK + distributed.SIZE * places  # in the whole batch
        s.eps, s.step_size, s.start = (x.new_zeros(()) for _ in range(3))

        def run():
            with frozen(self.model), torch.no_grad():
                self.folded.refold()
                tensors = s.x, s.y, s.noise, s.x_adv, s.eps, s.step_size
                self.nan |= pgd_loop(self.network, *tensors, self.n_iter, s.start)

        capture = self.capture or (captured if x.is_cuda else lambda run: run)
        try:
            return s, capture(run)
        except RuntimeError as error:  # cuda's and torch's
            reason = str(error).partition('\n')[0]
            warnings.warn(f'no CUDA graph, the attack is slower: {reason}', stacklevel=3)
            return s, run


def captured(run):
    """run(), which reads and writes fixed tensors on cuda, as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # warm-up, required before capture
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextlib.contextmanager
def tf32(allowed):
    """Inside, TF32 is allowed or not for float32 products and convolutions on tensor cores."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('high' if allowed else 'highest')
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn

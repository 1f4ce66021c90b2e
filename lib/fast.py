"""Networks and PGD at less cost: folded BatchNorm, memory layouts, PGD as a CUDA graph.

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
            copied = Folded(*fold(model))
            expected, logits = model(x).double(), copied(x).double()
        if (logits - expected).norm() <= 1e-3 * expected.norm():
            return copied
    except Exception:  # tracing fails in many ways
        pass
    return Folded(model)


class Folded(nn.Module):
    """What `folded` returns: a network and those of its convolutions that refold() updates."""

    def __init__(self, network, convolutions=()):
        super().__init__()
        self.network, self.convolutions = network, convolutions
        self.refold()

    def forward(self, x):
        return self.network(x)

    def refold(self):
        for convolution in self.convolutions:
            convolution.refold()


def fold(model):
    """A traced copy of `model`, and the `FoldedConvolution`s that replace its convolutions."""
    tracer = torch.fx.Tracer()
    tracer.proxy_buffer_attributes = True  # else results of buffers alone become constants
    root = copy.copy(model)  # the tracer leaves attributes on its root
    network = torch.fx.GraphModule(root, tracer.trace(root))
    nodes = [node for node in network.graph.nodes if node.op == 'call_module']
    modules = [network.get_submodule(node.target) for node in nodes]
    replaceable = {  # modules that are called once and without hooks
        node: module
        for node, module in zip(nodes, modules)
        if modules.count(module) == 1 and not (module._forward_hooks or module._forward_pre_hooks)
    }
    convolutions = []
    for node, conv in replaceable.items():
        if type(conv) is not nn.Conv2d:
            continue
        users = list(node.users)  # of its result
        bn = replaceable.get(users[0]) if len(users) == 1 else None
        if type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm) and bn.track_running_stats:
            users[0].replace_all_uses_with(node)
            network.graph.erase_node(users[0])
        else:
            bn = None
        convolutions.append(FoldedConvolution(conv, bn))
        network.set_submodule(node.target, convolutions[-1])
    network.recompile()
    network.delete_all_unused_submodules()
    return network, convolutions


class FoldedConvolution(nn.Module):
    """A copy of a convolution with the BatchNorm behind it, if any, folded in.

    Its parameters need no gradient. On a CPU it is channels_last, and with up to 3 channels its
    gradient is that of `ImageGradient`.
    """

    def __init__(self, conv, bn):
        super().__init__()
        self.original = conv, bn  # in a tuple they are no submodules
        self.conv = copy.deepcopy(conv)
        if conv.bias is None:
            self.conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        self.conv.requires_grad_(False)
        self.block = 0
        if conv.weight.device.type == 'cpu':
            self.conv.to(memory_format=torch.channels_last)
            usual = conv.stride == conv.dilation == (1, 1) and conv.groups == 1
            same_size = conv.padding == tuple(k // 2 for k in conv.kernel_size)
            if usual and same_size and conv.padding_mode == 'zeros':
                self.block = {1: 4, 2: 2, 3: 2}.get(conv.in_channels, 0)

    @torch.no_grad()
    def refold(self):
        conv, bn = self.original
        weight, bias = conv.weight, conv.bias
        if bn:
            statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            weight, bias = fuse_conv_bn_weights(weight, bias, *statistics)
        self.conv.weight.copy_(weight)
        if bias is not None:  # else it is and stays 0
            self.conv.bias.copy_(bias)
        if self.block:
            self.kernel = ImageGradient.kernel(self.conv.weight, self.block)

    def forward(self, x):
        conv = self.conv
        if self.block and x.shape[2] % self.block == x.shape[3] % self.block == 0:
            return ImageGradient.apply(x, conv.weight, conv.bias, conv.padding, self.kernel)
        return conv(x)


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
    """The attacker of a model in training: the `loop` of PGD, set up once for all batches.

    adversary(x, y, eps, step_size, start=..., seed=...) is pgd(model, x, y, eps, step_size, n_iter,
    ...) but for rounding: it attacks the `folded` network, with the parameters at the time of the
    call. On cuda the whole attack, folding included, is captured as a CUDA graph at the first batch
    of each shape; budgets are tensors in it, so that schedules can change them. Nothing waits for
    the device: values are not checked, but `nan` tells if a loss or gradient has been nan.

    `compiled` is applied to the network (torch.compile), `capture` to the attack, a function
    without arguments; by default this is `fast.captured` on cuda and nothing elsewhere. Where it
    fails, the attack runs as it is. For autocast to `dtype` the weights of convolutions are cast
    beforehand.
    """

    def __init__(self, loop, model, n_iter, x, *, compiled=None, capture=None, dtype=torch.float32):
        self.loop, self.model, self.n_iter, self.capture = loop, model, n_iter, capture
        self.attacks = {}  # shape of x -> what `set_up` returns
        self.nan = flag(x)
        self.folded = folded(model, x)
        if dtype != torch.float32:
            for convolution in self.folded.convolutions:
                convolution.conv.to(dtype)
        self.network = compiled(self.folded) if compiled else self.folded

    def __call__(self, x, y, eps, step_size, *, start=None, seed=0):
        if x.shape not in self.attacks:
            self.attacks[x.shape] = self.set_up(x, y)
        buffers, run = self.attacks[x.shape]
        buffers.x.copy_(x)
        buffers.y.copy_(y)
        buffers.noise.copy_(uniform('pgd', seed, buffers.index, x.shape[1:], x))
        buffers.eps.fill_(eps)
        buffers.step_size.fill_(step_size)
        buffers.start.fill_(step_size if start is None else start)
        run()
        return buffers.x_adv.clone()

    def set_up(self, x, y):
        """Buffers for batches of the shape of x, and a function that attacks what they hold."""
        buffers = SimpleNamespace(x=x.clone(), y=y.clone(), noise=torch.zeros_like(x))
        buffers.eps, buffers.step_size, buffers.start = (x.new_zeros(()) for _ in range(3))
        buffers.x_adv = torch.empty_like(x)
        rows = torch.arange(len(x), device=x.device)
        buffers.index = distributed.RANK + distributed.SIZE * rows  # in the batch of all processes

        def run():
            with frozen(self.model), torch.no_grad():
                self.folded.refold()
                images = buffers.x, buffers.y, buffers.noise, buffers.x_adv
                budget = buffers.eps, buffers.step_size, self.n_iter, buffers.start
                self.nan |= self.loop(self.network, *images, *budget)

        capture = self.capture or (captured if x.is_cuda else lambda run: run)
        try:
            return buffers, capture(run)
        except RuntimeError as error:  # cuda's and torch's
            reason = str(error).partition('\n')[0]
            warnings.warn(f'no CUDA graph, the attack is slower: {reason}', stacklevel=3)
            return buffers, run


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

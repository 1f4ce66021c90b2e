"""Several processes on one job, started by torchrun; in a single one all of this does nothing.

All processes run the same script. Images are dealt to them, what they compute is summed, and the
first alone prints and writes. Random numbers hang on the image, so that N processes give the
results of one, but for rounding.
"""

import contextlib
import os

import torch
from torch import distributed as dist

RANK, SIZE = (int(os.environ.get(name, n)) for name, n in (('RANK', 0), ('WORLD_SIZE', 1)))


@contextlib.contextmanager
def joined():
    """Inside, the processes can reach each other, and those after the first print nothing.

    ChildProcessError if another one ends before its time.
    """
    if SIZE == 1:
        yield
        return
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')
    try:
        with open(os.devnull, 'w') as silence:
            with contextlib.redirect_stdout(silence) if RANK else contextlib.nullcontext():
                yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or 'gloo' in str(error):
            again = 'another process of this job has ended; the same command resumes'
            raise ChildProcessError(again) from None
        raise
    finally:
        dist.destroy_process_group()


def wait():
    """Returns once all processes are here."""
    if SIZE > 1:
        dist.barrier()


def share(n):
    """This process's part of a batch of n, a slice, and how many of its images count: all, or none
    of a first one where there are more processes than images."""
    return (slice(RANK, None, SIZE), len(range(RANK, n, SIZE))) if RANK < n else (slice(1), 0)


def total(*tensors):
    """Replaces each tensor by its sum over the processes, one message for all."""
    if SIZE > 1:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.detach().copy_(part.view_as(tensor))


def synchronised(model, device):
    """`model` with the BatchNorm statistics of whole batches on cuda; on a CPU, where torch has no
    such layer, each process keeps those of its part, and the first one's are saved."""
    if torch.device(device).type == 'cuda':
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        print(f'on a CPU each of the {SIZE} processes has BatchNorm statistics of its own images')
    return model


def shared(attack):
    """`attack`, a function (model, x, y, index=..., ...) -> x_adv, by all processes together: each
    attacks a part of the images, and all have the whole result."""

    def run(model, x, y, *, index=None, **options):
        index = torch.arange(len(x)) if index is None else index
        own, x_adv = slice(RANK, None, SIZE), torch.zeros_like(x)
        x_adv[own] = attack(model, x[own], y[own], index=index[own], **options)
        total(x_adv)
        return x_adv

    return run if SIZE > 1 else attack

"""Several processes on one job, started by torchrun; in a single one all of this does nothing.

All processes run the same script. Images are dealt to them, what they compute is summed, and the
first alone prints and writes. Random numbers hang on the image, so that N processes give the
results of one, but for rounding.
"""

import contextlib
import datetime
import math
import os

import torch
from torch import distributed as dist

from classifier import NotFiniteError, has_nan, refuse_nan

RANK, SIZE = (int(os.environ.get(name, n)) for name, n in (('RANK', 0), ('WORLD_SIZE', 1)))


@contextlib.contextmanager
def joined():
    """Inside, the processes can reach each other, and those after the first print nothing.

    ChildProcessError if another one ends before its time.
    """
    if SIZE == 1:
        yield
        return
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    # the first may wait long for a folder that is in use
    dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
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


def agree(value):
    """ValueError unless `value` is the same in all processes: files may change between their
    looks."""
    found = [value] * SIZE
    if SIZE > 1:
        dist.all_gather_object(found, value)
    if any(other != value for other in found):
        raise ValueError(f'the processes have found different files, one {value}; run it again')


def own():
    """This process's places among images that are dealt out, a slice."""
    return slice(RANK, None, SIZE)


def share(n):
    """This process's images of a batch of n, a slice, and how many of them count. A process without
    any gets the first image, counted 0 times, so that its network sees a batch, too."""
    counted = len(range(n)[own()])
    return (own(), counted) if counted else (slice(1), 0)


def total(*tensors):
    """Replaces each tensor by its sum over the processes, one message for all."""
    if SIZE > 1 and tensors:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.detach().copy_(part.view_as(tensor))


def synchronised(model, device):
    """`model` with the BatchNorm statistics of whole batches, on cuda; on a CPU, where torch has no
    such layer, each process has those of its images, of which `average` makes one."""
    if SIZE == 1:
        return model
    if torch.device(device).type == 'cuda':
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        print(f'each of {SIZE} processes has BatchNorm statistics of its own, averaged each epoch')
    return model


def average(*tensors):
    """Replaces each tensor of floats by its mean over the processes."""
    if SIZE > 1:
        total(*(floats := [tensor for tensor in tensors if tensor.is_floating_point()]))
        for tensor in floats:
            tensor.div_(SIZE)


def shared(attack):
    """`attack`, a function (model, x, y, index=..., ...) -> x_adv, by all processes together: each
    attacks a part of the images, and all have the whole result. NotFiniteError in all if in one."""

    def run(model, x, y, *, index=None, **options):
        index = torch.arange(len(x)) if index is None else index
        rows, x_adv = own(), torch.zeros_like(x)
        try:
            x_adv[rows] = attack(model, x[rows], y[rows], index=index[rows], **options)
        except NotFiniteError:
            x_adv[:] = math.nan
        total(x_adv)
        refuse_nan(has_nan(x_adv))
        return x_adv

    return run if SIZE > 1 else attack

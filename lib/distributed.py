"""Several processes on one job, started by torchrun; in a single process all of this does nothing.

All run the same script, each on a share of the images, and exchange sums; only the first prints and
writes. Random numbers depend on the image: N processes have the results of one, but for rounding.
"""

import contextlib
import datetime
import os
import sys

import torch

# Imported before there is a process group: its functions would have that as a default argument, so
# that its threads lived until the interpreter ends, and then they may abort the process.
import torch.distributed.nn  # noqa: F401
from torch import distributed as dist

SIZE = int(os.environ.get('WORLD_SIZE', 1))
RANK = int(os.environ.get('RANK', 0)) if SIZE > 1 else 0  # a RANK alone is of something else


@contextlib.contextmanager
def joined():
    """Inside, processes can communicate, and only the first one prints.

    ChildProcessError if another process ends early.
    """
    if SIZE == 1:
        yield
        return
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    # a long timeout: the first process may wait for a folder that is in use
    dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
    try:
        with open(os.devnull, 'w') as silence:
            with contextlib.redirect_stdout(silence if RANK else sys.stdout):
                yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or 'gloo' in str(error):
            reason = 'another process of this job has ended; the same command resumes'
            raise ChildProcessError(reason) from None
        raise
    finally:
        dist.destroy_process_group()


def wait():
    """Returns once all processes are here."""
    if SIZE > 1:
        dist.barrier()


def agree(value):
    """ValueError unless `value`, which was found in files, is the same in all processes."""
    values = [value] * SIZE
    if SIZE > 1:
        dist.all_gather_object(values, value)
    if any(other != value for other in values):
        raise ValueError(f'the processes have found different files, one {value}; run it again')


def own():
    """The slice of the images that are this process's."""
    return slice(RANK, None, SIZE)


def share(n):
    """The slice of a batch of n images that this process takes, and how many of them count.

    Where there are fewer images than processes, those left over take the first image, since a
    network needs one, and count 0 of it.
    """
    counted = len(range(n)[own()])
    return (own(), counted) if counted else (slice(1), 0)


def total(*tensors):
    """Replaces each tensor by its sum over the processes, in one message."""
    if SIZE > 1 and tensors:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.detach().copy_(part.view_as(tensor))


def synchronized(model, device):
    """`model`, on cuda with the BatchNorm statistics of whole batches. On a CPU torch has no such
    layer: each process has the statistics of its images, to be averaged by `average`."""
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
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        total(*floats)
        for tensor in floats:
            tensor.div_(SIZE)

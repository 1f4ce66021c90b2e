"""What the command lines of the scripts share: types, flags, progress and one-line errors."""

import argparse
import contextlib
import math
import os
import re
import sys

import torch
from tqdm import tqdm

import data
from lib import distributed


class Diverged(Exception):
    """A run whose loss became nan or infinite: a result, but no model."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of each flag that has one."""

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, [], argparse.SUPPRESS):
            return action.help
        return f'{action.help} (default: %(default)s)'


def budget(low=0, high=1):
    """A type for argparse: a budget or step, 8/255 or 0.4, as a fraction of the pixel range."""

    def parse(text):
        numerator, _, denominator = text.partition('/')
        try:
            value = float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            message = f'{text!r} is not a number such as 8/255 or 0.4'
            raise argparse.ArgumentTypeError(message) from None
        if not low <= value <= high:
            hint = f': did you mean {text}/255?' if value > high else ''
            raise argparse.ArgumentTypeError(f'{text} is not in [{low}, {high}]{hint}')
        return value

    return parse


def step(text):
    """A type for argparse: a step as a `budget`, or such as eps/8, which stays a string."""
    return text if re.fullmatch(r'eps/[1-9]\d*', text) else budget()(text)


def number(low, high=math.inf):
    """A type for argparse: a finite number from `low` to `high`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high and math.isfinite(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from {low:g} to {high:g}')

    return parse


def whole(low):
    """A type for argparse: a whole number of at least `low` that fits into 64 bits."""

    def parse(text):
        if text.isdecimal() and low <= int(text) < 2**63:
            return int(text)
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from {low} to 2^63 - 1')

    return parse


count = whole(1)


def device(text):
    """A type for argparse: cpu, cuda:1, or cuda: for each torchrun process a GPU of its own."""
    if text == 'cuda':
        text = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        if torch.empty(0, device=text).is_cuda:
            torch.cuda.set_device(text)  # streams and graphs are made there
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'{text} cannot be used: {error}') from None
    return text


def add_machine_flags(parser):
    """The flags that say where to compute and where the data are; they change no result."""
    add = parser.add_argument
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--device', type=device, default=default, help='cuda if there is one')
    add('--data-dir', default='data', help='folder of <dataset>.npz and downloads')


def add_flags(parser):
    """Adds the flags that all analyses share."""
    add = parser.add_argument
    add('--n-examples', type=count, help='number of images, a fixed random subset; all')
    add('--eps', type=budget(), help="the run's; the paper's for a checkpoint outside of a run")
    add('--dataset', choices=data.DATASETS, help='of a checkpoint outside of a run; by its shape')
    add('--seed', type=whole(0), default=0, help='of attacks and random vectors')
    add('--batch-size', type=count, default=250, help='images in the model at a time')
    add_machine_flags(parser)


class Lines:
    """A file that turns each state of a progress bar into a line on stderr."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


def bar(unit, total=None, done=0):
    """A progress bar, of whose `total` units `done` are over; in a file, a line a minute."""
    options = {'unit': unit, 'total': total, 'initial': done}
    options['unit_scale'] = total is None or total > 10000
    if not sys.stderr.isatty():
        options |= {'file': Lines(), 'mininterval': 60, 'delay': 60, 'ncols': 80}
    return tqdm(leave=False, disable=distributed.RANK > 0, **options)


def run(main):
    """Runs a script's main; bad input, full memory and Ctrl-C end it with one line."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors='replace')  # not every terminal can show a dash
    try:
        with distributed.joined():
            main()
    except Diverged as end:
        if distributed.RANK == 0:
            print(f'{end}: nothing to do')
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get('TRACEBACK'):  # for those who change the code
            raise
        where = f'process {distributed.RANK}: ' if distributed.SIZE > 1 else ''
        sys.exit(f'{where}error: {" ".join(str(error).split())}')
    except KeyboardInterrupt:
        sys.exit('interrupted; run the same command again to resume')
    except (MemoryError, RuntimeError) as error:  # torch's and cuda's are RuntimeErrors
        if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            reason = str(error).partition('\n')[0]
            sys.exit(f'error: --compile failed ({reason}); leave it out, or install a compiler')
        if isinstance(error, RuntimeError) and 'memory' not in str(error).lower():
            raise
        reason = str(error).partition('\n')[0]
        sys.exit(f'error: memory ran out ({reason}); try a smaller --batch-size or --n-examples')

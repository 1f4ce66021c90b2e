"""What a run leaves on disk, and how to read it back.

One run is one folder: config.json (every flag, and the sessions that worked on it), log.jsonl (one
line per epoch), period1.pt ... (a plain state_dict at the end of each period) and, until the run is
complete, last.pt. Each file is replaced as a whole, so whatever the moment of a crash there is an
old one or a new one, never half of one.
"""
import argparse
import contextlib
import datetime
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import pickle
import platform
import re
import subprocess
import sys

import torch

import models


def replace(path, write):
    """Calls write(file) on a new binary file, then puts it at `path` in one step, safe on disk."""
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f'{path} could not be written ({error})') from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def suffixed(path, suffix):
    """`path` with `suffix` behind its name, which may hold dots."""
    return path.with_name(path.name + suffix)


def save(path, content):
    """Writes a .pt by `torch.save`, a list to .jsonl, one line an item, anything else as JSON."""
    path = pathlib.Path(path)
    if path.suffix == '.pt':
        buffer = io.BytesIO()
        torch.save(content, buffer)
        replace(path, lambda file: file.write(buffer.getbuffer()))
    elif path.suffix == '.jsonl':
        replace(path, lambda file: file.write(
            ''.join(json.dumps(row) + '\n' for row in content).encode()))
    else:
        replace(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def load(path):
    """What `save` wrote. ValueError, naming the file, if it is truncated or not plain data."""
    path = pathlib.Path(path)
    with open(path, 'rb') as file:
        try:
            if path.suffix == '.json':
                return json.load(file)
            if path.suffix == '.jsonl':
                return [json.loads(line) for line in file]
            # runs no code of a stranger's checkpoint
            return torch.load(file, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f'{path} is refused: it is damaged or no plain state_dict '
                             '(only tensors are loaded, never code)') from None
        except Exception as error:  # damaged bytes make the readers raise nearly anything
            reason = re.split(r'\n|\. ', str(error))[0] or type(error).__name__
            raise ValueError(f'{path} is truncated or damaged: {reason}') from None


@contextlib.contextmanager
def lock(folder, wait=False):
    """Inside, `folder` (made if missing) is this process's.

    While another process has it this one waits, or raises ValueError. The operating system holds
    the lock, on the file .lock, and lifts it when its owner ends, however it does.
    """
    path = pathlib.Path(folder) / '.lock'  # network file systems lock no folders
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, 'a') as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise ValueError(f'{folder} is in use by another process; wait for it, by '
                                     'yourself or with --wait, or choose another folder') from None
                print(f'{folder} is in use by another process; waiting for it', flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                    continue
            except FileNotFoundError:
                continue  # its owner took the file away on leaving
            try:
                for leftover in path.parent.iterdir():  # of a process killed while it wrote
                    if re.fullmatch(LEFTOVER, leftover.name):
                        leftover.unlink()
                yield
            finally:
                path.unlink(missing_ok=True)
                fcntl.flock(handle, fcntl.LOCK_UN)
            return


LEFTOVER = (r'\.(config|log|trace|diverged|last|period\d+|table1|claims|landscape'
            r'|(worst|evaluate|hessian|similarity|surface|connect|dead|theory|fig|c2).*)'
            r'\.(json|jsonl|npz|png|pt|md|csv)\.\d+\.tmp')


def start(folder, config, device):
    """Begins the run in `folder` or continues it if `config` (flag -> value) is what it began with.

    Returns the state in last.pt, None where the run is at its beginning or files of it are lost.
    ValueError names the flags that differ, and a file that is not this run's.
    """
    folder, session = pathlib.Path(folder), describe(device)
    sessions = []
    if (folder / 'config.json').exists():
        begun = config_of(folder)
        changed = [flag for flag in config if begun.get(flag) != config[flag]]
        if changed:
            flags = ', '.join(f'--{flag.replace("_", "-")} {begun.get(flag)} (now {config[flag]})'
                              for flag in changed)
            raise ValueError(f'{folder} was begun with {flags}; continue it with the same flags, '
                             'or name a new folder with --out')
        sessions = begun['sessions']
    elif any(path.name != '.lock' for path in folder.iterdir()):
        raise ValueError(f'{folder} holds files but no config.json, so it is no run; '
                         'name another folder with --out')
    if session not in sessions and not (sessions and finished(folder)):
        save(folder / 'config.json', config | {'sessions': sessions + [session]})
    last, lost = folder / 'last.pt', []
    if last.exists():
        try:
            state = load(last)
            sound = all(state['config'].get(flag) == config[flag] for flag in config) and all(
                isinstance(row, dict) for row in (*state['log'], state['model'],
                                                  state['optimizer']))
        except ValueError as error:
            raise ValueError(f'{error}; delete it, and the run begins again') from None
        except (LookupError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise ValueError(f'{last} is not of this run; delete it, and the run begins again')
        ends = itertools.accumulate(config['periods'])
        lost = [path.name for path, end in zip(period_files(folder, config), ends)
                if end <= len(state['log']) and not path.exists()]
        if not lost:
            return state
    elif (folder / 'log.jsonl').exists() and not finished(folder):
        lost = ['last.pt']
    if lost:
        print(f'{folder}: {", ".join(lost)} is missing; it begins again')
    return None


def config_of(folder):
    """The config.json of the run in `folder`; ValueError if there is none, or none of a run."""
    path = pathlib.Path(folder) / 'config.json'
    if not path.exists():
        raise ValueError(f'{folder} is no run: it has no config.json')
    config = load(path)
    needed = dict(dataset=str, model=str, width=int, eps=(int, float), eps_sched=str, periods=list,
                  epochs=int, step_size=(int, float), n_iter=int, seed=int, sessions=list)
    if not isinstance(config, dict) or not all(
            isinstance(config.get(key), kind) for key, kind in needed.items()) or not (
            0 <= config['eps'] <= 1 and config['step_size'] >= 0 and config['periods'] and all(
                isinstance(n, int) and n > 0 for n in (
                    config['n_iter'], config.get('n_train') or 1, *config['periods']))):
        raise ValueError(f'{path} is damaged; without it the run must begin again, elsewhere')
    return config


def digest(path):
    """What tells a checkpoint from any other: the SHA-256 of the file."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def sign(result, device):
    """Adds to result['sessions'] that this machine and commit worked on it."""
    session = describe(device)
    result['sessions'] += [session] * (session not in result['sessions'])


def describe(device):
    """Where numbers come from: commit, versions, device and date, as a dict."""
    try:
        command = ['git', 'describe', '--always', '--dirty', '--exclude=*']
        commit = subprocess.run(command, text=True, capture_output=True,
                                cwd=pathlib.Path(__file__).parent, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    if torch.device(device).type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    return {'commit': commit, 'python': platform.python_version(), 'torch': torch.__version__,
            'device': name, 'date': datetime.date.today().isoformat()}


def finished(folder):
    """Whether all periods of the run in `folder` are over, and their models there."""
    periods = period_files(folder, config_of(folder))
    return all(path.exists() for path in periods) and not (folder / 'last.pt').exists()


def period_files(folder, config):
    """Where the model at the end of each period of a run lies: period1.pt, period2.pt, ..."""
    return [folder / f'period{i + 1}.pt' for i in range(len(config['periods']))]


def members(path):
    """(checkpoint, config of its run or None) for each member of the ensemble that `path` means.

    A folder means the model at the end of each period: one, or the ensemble of a periodic run.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        config = config_of(path)
        if not finished(path):
            raise ValueError(f'{path} is not finished; continue it with the train.py command that '
                             'began it, or name its checkpoints one by one')
        return [(file, config) for file in period_files(path, config)]
    if not path.exists():
        raise ValueError(f'{path} does not exist')
    return [(path, config_of(path.parent) if (path.parent / 'config.json').exists() else None)]


def rebuild(path, config=None):
    """The network in the checkpoint `path`, as `config` says or else as its names and shapes tell.

    ValueError, naming the file, where it is no plain state_dict, does not fit, or is not finite.
    """
    state = load(path)
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor)
            for key, value in state.items()):
        raise ValueError(f'{path} is no plain state_dict; '
                         'the checkpoints of a run are period1.pt, period2.pt, ...')
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta or not (
                value.is_floating_point() or key.endswith('num_batches_tracked')):
            raise ValueError(f'{path} does not fit: {key} should be a plain tensor of floats')
        if not value.float().isfinite().all():
            raise ValueError(f'{path} holds values that are not finite, in {key}')
    try:
        if config is None:
            return models.recognise(state)
        model = models.build(config['model'], config['dataset'], config['width'])
        model.load_state_dict(state)
        return model
    except (RuntimeError, ValueError) as error:
        raise ValueError(f'{path} does not fit: {error}') from None


def number(kind, least=None, most=None):
    """A type for argparse: an int or a float, `kind`, within bounds; never nan or infinite."""
    least = -1e9 if least is None else least
    most = (2 ** 31 - 1 if kind is int else 1e9) if most is None else most

    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            bound = f'at most {most}' if value > most else f'at least {least}'
            raise argparse.ArgumentTypeError(f'{text} is not {bound}')
        return value
    convert.__name__ = kind.__name__
    return convert


def budget(text, least=0, most=1):
    """A budget or step, '8/255' or '0.4' in the paper, as a fraction of the pixel range [0, 1]."""
    numerator, _, denominator = text.partition('/')
    try:
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f'{text!r} is no number such as 8/255 or 0.4') from None
    if not least <= value <= most:
        hint = f'; did you mean {text}/255?' if most < value <= 255 else ''
        raise argparse.ArgumentTypeError(f'{text} is not in [{least}, {most}], in fractions of '
                                         f'the range of a pixel{hint}')
    return value


def device(text):
    """A type for argparse: a device that this machine has, cpu, cuda or cuda:1."""
    try:
        if torch.empty(0, device=text).device.type in ('cpu', 'cuda'):
            return text
        reason = 'only cpu and cuda are supported'
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    raise argparse.ArgumentTypeError(f'{text} cannot be used here: {reason}')


def add_machine_flags(parser):
    """The flags that say where and when to compute; they change no result."""
    parser.add_argument('--device', type=device,
                        default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: cuda if there is one, else cpu')
    parser.add_argument('--data-dir', default='data', help='folder of mnist.npz and cifar10.npz, '
                        'and for downloads; default: data')
    parser.add_argument('--wait', action='store_true', help='wait for a folder that another '
                        'process has in use; default: end with an error')


def run(main, interrupted='the same command goes on from what is on disk'):
    """Runs a script's main; bad input and Ctrl-C end it with one line, not with a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
    except ImportError as error:
        sys.exit(f'error: {error}; pip install -r requirements.txt brings all packages')
    except KeyboardInterrupt:
        sys.exit(f'interrupted; {interrupted}')

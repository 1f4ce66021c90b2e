"""What a run leaves on disk, and how to read it back.

One run is one folder: config.json (every setting, and its provenance), log.jsonl (one line per
epoch), period1.pt ... (a plain state_dict at the end of each period) and, until the run is
complete, last.pt. Each file is replaced atomically: after a crash there is the old or the new one.
"""

import contextlib
import datetime
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
import zipfile

import filelock
import numpy as np
import torch

import data
import models
from lib import distributed


def replace(path, write):
    """Calls write(file) on a new binary file, syncs it to disk and moves it to `path` in one step.
    Of several processes the first one writes, once all are here."""
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')  # no clash: writers hold the folder's lock
    distributed.wait()
    if distributed.RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, 'wb') as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise OSError(f'{path} could not be written ({error})') from None
    distributed.wait()


def save(path, content):
    """Writes .pt by `torch.save`, .npz from a dict of arrays, .jsonl from a list, or else JSON."""
    path, buffer = pathlib.Path(path), io.BytesIO()
    if path.suffix == '.pt':
        torch.save(content, buffer)
    elif path.suffix == '.npz':
        np.savez(buffer, **content)
    elif path.suffix == '.jsonl':
        buffer.write(''.join(json.dumps(row) + '\n' for row in content).encode())
    else:
        buffer.write(json.dumps(content, indent=1).encode())
    replace(path, lambda file: file.write(buffer.getbuffer()))


def load(path):
    """What `save` wrote. ValueError, naming the file, if it is missing, truncated or foreign."""
    path = pathlib.Path(path)
    try:
        if path.suffix == '.jsonl':
            return [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == '.json':
            return json.loads(path.read_text())
        if path.suffix == '.npz':
            with np.load(path) as arrays:
                return dict(arrays)
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f'the checksum of {part} is wrong')
        # weights_only: a stranger's checkpoint runs no code
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f'{path} is refused: damaged, or more than a plain state_dict') from None
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        reason = re.split(r'\n|\. ', str(error))[0] or type(error).__name__
        raise ValueError(f'{path} cannot be read: {reason}') from None


@contextlib.contextmanager
def lock(folder):
    """Inside, this job alone holds `folder`, which is created if missing; waits while another one
    does. The lock is released when its holder ends, even by SIGKILL."""
    if distributed.RANK > 0:  # the first process holds it
        distributed.wait()
        yield
        return
    path = pathlib.Path(folder) / '.lock'
    path.parent.mkdir(parents=True, exist_ok=True)
    folder_lock = filelock.FileLock(path)
    try:
        acquired = folder_lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f'{folder} is in use by another process; waiting for it')
        acquired = folder_lock.acquire()
    with acquired:
        distributed.wait()
        yield


def start(folder, config, defaults, device):
    """Begins the run in `folder`, or resumes it if it was begun with the same `config`; settings
    that are missing from its config.json take their `defaults`.

    Returns the state in last.pt or None. ValueError names settings that differ or missing files.
    """
    path, last, log_file = folder / 'config.json', folder / 'last.pt', folder / 'log.jsonl'
    begun = dict(config)
    others = [file for file in folder.iterdir() if file != path and file.name[0] != '.']
    if others:  # else no epoch is over, and settings may still be corrected
        if not path.exists():
            raise ValueError(f'{folder} holds files but no config.json; name another with --out')
        begun = defaults | load(path)
    state, log = None, []
    if last.exists():
        state = load(last)
        log = state['log']
    elif log_file.exists():
        log = load(log_file)
    changed = [name for name in config if begun[name] != config[name]]
    if changed:
        was, now = (data.show_settings(changed, settings) for settings in (begun, config))
        raise ValueError(f'{folder} was begun with {was}, not {now}; name a new one with --out')
    ends = itertools.accumulate(config['periods'])
    files = [file for file, end in zip(period_files(folder, config), ends) if end <= len(log)]
    if 0 < len(log) < config['epochs']:
        files.append(last)
    missing = ', '.join(file.name for file in files if not file.exists())
    if missing:
        raise ValueError(f'{folder} has lost {missing}: put it back, or delete all to start over')
    if len(log) < config['epochs']:
        add_provenance(begun, device)
        save(path, begun)
    return state


def load_config(folder):
    """The config.json of the run in `folder`; ValueError if there is none."""
    path = pathlib.Path(folder) / 'config.json'
    if not path.exists():
        raise ValueError(f'{folder} is not a run: it has no config.json')
    return load(path)


def period_files(folder, config):
    """The path of the model at the end of each period of a run: period1.pt, period2.pt, ..."""
    return [pathlib.Path(folder) / f'period{i + 1}.pt' for i in range(len(config['periods']))]


def finished(folder):
    """Whether all periods of the run in `folder` are over, and their models there."""
    files = period_files(folder, load_config(folder))
    return all(file.exists() for file in files) and not files[0].with_name('last.pt').exists()


class Diverged(Exception):
    """A run whose loss became nan or infinite: a result, but no model."""


class Unfinished(ValueError):
    """A run that can be resumed: no result yet."""


def find_runs(paths):
    """The runs and checkpoints among `paths`, and all runs below a folder that is not a run."""
    found = []
    for path in map(pathlib.Path, paths):
        is_run = not path.is_dir() or (path / 'config.json').exists()
        found += [path] if is_run else sorted(file.parent for file in path.rglob('config.json'))
    return found


def members(path):
    """The checkpoints of the ensemble at `path`: of a run folder the model at the end of each
    period, else `path` itself. Unfinished or Diverged for a run that is."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return [path]
    config = load_config(path)
    if (path / 'diverged.json').exists():
        raise Diverged(f'{path} diverged in epoch {load(path / "diverged.json")["epoch"]}')
    if not finished(path):
        raise Unfinished(f'{path} is not finished; resume it with the same train.py command')
    return period_files(path, config)


def load_model(path, dataset=None):
    """The network in the checkpoint `path` and the settings of its run.

    Outside of a run they are the paper's for the first model and dataset (`dataset` if given) that
    the shapes fit. ValueError, naming the file, where they fit none.
    """
    state = load(path)
    folder = pathlib.Path(path).parent
    config = load_config(folder) if (folder / 'config.json').exists() else None
    try:
        config = config or recognize(state, [dataset] if dataset else data.DATASETS)
        if dataset not in (None, config['dataset']):
            raise ValueError(f'its run is on {config["dataset"]}, not on {dataset}')
        model = models.build(config['model'], data.DATASETS[config['dataset']], config['width'])
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f'{path} does not fit: {error}') from None
    return model, config


def recognize(state, datasets):
    """The paper's settings for the first dataset and model with the names and shapes of `state`."""
    for dataset, model in itertools.product(datasets, models.MODELS):
        with torch.device('meta'):
            thin = models.build(model, data.DATASETS[dataset], 1).state_dict()
            width = len(next(iter(state.values()))) // len(next(iter(thin.values())))
            fits = models.build(model, data.DATASETS[dataset], max(1, width)).state_dict()
        if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in fits.items()}:
            found = {'dataset': dataset, 'model': model, 'width': width}
            return data.DATASETS[dataset].settings() | found
    raise ValueError(
        f'these are the parameters of none of {", ".join(models.MODELS)} on '
        f'{", ".join(datasets)}, but {", ".join(list(state)[:3]) or "nothing"}, ...'
    )


def digest(path):
    """SHA-256 of the checkpoint file."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def add_provenance(result, device):
    """Adds the commit, versions, device and date of this session to result['provenance']."""
    here = pathlib.Path(__file__).parent
    command = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    commit = subprocess.run(command, text=True, capture_output=True, cwd=here).stdout.strip()
    name = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    if torch.device(device).type == 'cuda':
        name = torch.cuda.get_device_name(device)
    session = {'commit': commit, 'python': platform.python_version(), 'torch': torch.__version__}
    session |= {'device': name, 'date': datetime.date.today().isoformat()}
    sessions = result.setdefault('provenance', [])
    if session not in sessions:
        sessions.append(session)

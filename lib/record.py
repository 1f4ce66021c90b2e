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
from lib import cli, distributed


def replace(path, content):
    """Writes bytes to a new file, syncs it to disk and moves it to `path` in one step. Of several
    processes the first one writes, once all are here."""
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')  # no clash: writers hold the folder's lock
    distributed.wait()
    if distributed.RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, 'wb') as file:
                file.write(content)
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
    replace(path, buffer.getbuffer())


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
        text = getattr(error, 'strerror', None) or str(error)  # the path is named anyway
        reason = re.split(r'\n|\. ', text)[0] or type(error).__name__
        raise ValueError(f'{path} cannot be read: {reason}') from None


@contextlib.contextmanager
def lock(folder):
    """Inside, this job alone holds `folder`, which is created if missing; waits while another one
    does. The lock is released when its holder ends, even by SIGKILL."""
    folder_lock = filelock.FileLock(pathlib.Path(folder) / '.lock')
    if distributed.RANK == 0:  # the first process holds it
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            folder_lock.acquire(blocking=False)
        except filelock.Timeout:
            print(f'{folder} is in use by another process; waiting for it')
            folder_lock.acquire()
    distributed.wait()
    try:
        yield
    finally:
        folder_lock.release()


def start(folder, config, defaults, device):
    """Begins the run in `folder`, or resumes it if it was begun with the same `config`; settings
    that are missing from its config.json take their `defaults`.

    Returns the state in last.pt or None. ValueError names settings that differ or missing files.
    """
    path, last, log_file = folder / 'config.json', folder / 'last.pt', folder / 'log.jsonl'
    names = {file.name for file in folder.iterdir() if file.name[0] != '.'}
    is_new = names <= {path.name}  # no epoch is over: settings may still be corrected
    if not is_new and path.name not in names:
        raise ValueError(f'{folder} holds files but no config.json; name another with --out')
    begun = dict(config) if is_new else defaults | load(path)
    changed = [name for name in config if begun.get(name, config[name]) != config[name]]
    if changed == ['data']:
        raise ValueError(f'{folder} was begun on other images than those of --data-dir')
    if changed:
        was, now = (data.show_settings(changed, settings) for settings in (begun, config))
        raise ValueError(f'{folder} was begun with {was}, not {now}; name a new one with --out')
    state = load(last) if last.exists() else None
    log = load(log_file) if not state and log_file.exists() else []
    n_epochs = len(state['log'] if state else log)
    ends = itertools.accumulate(config['periods'])
    needed = [file for file, end in zip(period_files(folder, config), ends) if end <= n_epochs]
    if 0 < n_epochs < config['epochs']:
        needed.append(last)
    lost = ', '.join(file.name for file in needed if not file.exists())
    if lost:
        raise ValueError(f'{folder} has lost {lost}: put it back, or delete all to start over')
    if n_epochs < config['epochs']:
        add_provenance(begun, device)
        save(path, begun)
    return state


def is_run(folder):
    """Whether train.py has begun `folder`: the config.json of a foreign model has no periods."""
    path = pathlib.Path(folder) / 'config.json'
    return path.exists() and 'periods' in load(path)


def load_config(folder):
    """The config.json of the run in `folder`; ValueError if there is none."""
    if not is_run(folder):
        raise ValueError(f'{folder} is not a run: it has no config.json of train.py')
    return load(pathlib.Path(folder) / 'config.json')


def period_files(folder, config, weights='last'):
    """The path of the model of each period of a run: period1.pt, period2.pt, ... at its end; with
    `weights` best or ema such as best1.pt."""
    stem = 'period' if weights == 'last' else weights
    return [pathlib.Path(folder) / f'{stem}{i + 1}.pt' for i in range(len(config['periods']))]


def finished(folder):
    """Whether all periods of the run in `folder` are over, and their models there."""
    files = period_files(folder, load_config(folder))
    return all(file.exists() for file in files) and not files[0].with_name('last.pt').exists()


class NoModel(ValueError):
    """A run without the models that are asked for: it is not finished, or never kept such."""


def find_runs(paths):
    """The runs and checkpoints among `paths`, and all runs below a folder that is not a run: each
    once, by the path or link that comes first."""
    found, seen = [], set()
    waiting = [pathlib.Path(path) for path in paths][::-1]
    while waiting:
        path = waiting.pop()
        if os.path.realpath(path) in seen:  # such as a link to a folder above it
            continue
        seen.add(os.path.realpath(path))
        if not path.is_dir() or is_run(path):
            found.append(path)
        else:
            folders = [child for child in path.iterdir() if child.is_dir()]
            waiting += sorted(folders, reverse=True)
    return found


def members(path, weights='last', member=None):
    """The checkpoints of the ensemble at `path`: of a run folder the model of each period, or of
    the member-th alone (from 1), else `path` itself. NoModel or cli.Diverged where there is none.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        if weights != 'last' or member:
            raise ValueError(f'{path} is no run, to which --weights and --member apply')
        return [path]
    config = load_config(path)
    if (path / 'diverged.json').exists():
        raise cli.Diverged(f'{path} diverged in epoch {load(path / "diverged.json")["epoch"]}')
    if not finished(path):
        raise NoModel(f'{path} is not finished; resume it with the same train.py command')
    files = period_files(path, config, weights)
    if not all(file.exists() for file in files):
        flags = 'the best ones with --n-val, averages with --ema'
        raise NoModel(f'{path} has no {files[0].name}: train.py keeps {flags}')
    if member and member > len(files):
        raise NoModel(f'--member {member}: {path} has periods 1 .. {len(files)}')
    return files[member - 1 : member] if member else files


def load_model(path, dataset=None):
    """The network in the checkpoint `path` and the settings of its run.

    Outside of a run they are the paper's for the first model and dataset (`dataset` if given) that
    the shapes fit. ValueError, naming the file, where they fit none.
    """
    content, folder = load(path), pathlib.Path(path).parent
    config = load_config(folder) if is_run(folder) else None
    try:
        state = state_dict_in(content)
        config = config or recognize(state, [dataset] if dataset else data.DATASETS)
        if dataset not in (None, config['dataset']):
            raise ValueError(f'its run is on {config["dataset"]}, not on {dataset}')
        model = models.build(config['model'], data.DATASETS[config['dataset']], config['width'])
        model.load_state_dict(renamed(state, model.state_dict()))
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f'{path} does not fit: {error}') from None
    return model, config


def state_dict_in(content):
    """The parameters in a checkpoint, which may hold them beside other things, such as an epoch."""
    if not isinstance(content, dict):
        raise ValueError(f'it is a {type(content).__name__}, not a state_dict')
    inside = {}
    for key, value in content.items():
        if isinstance(value, dict) and value and all(map(torch.is_tensor, value.values())):
            inside[str(key)] = value
    if len(inside) > 1:
        raise ValueError(f'it holds several models, {", ".join(inside)}: save one of them alone')
    return inside.popitem()[1] if inside else content


def renamed(state, names):
    """`state`, if it lacks some `names`, without what DataParallel, torch.compile and AveragedModel
    add to a state_dict: prefixes and a counter."""
    if names.keys() <= state.keys():
        return state
    state = {re.sub(r'^((module|_orig_mod)\.)+', '', str(key)): state[key] for key in state}
    state.pop('n_averaged', None)
    return state


def recognize(state, datasets):
    """The paper's settings for the first dataset and model with the names and shapes of `state`; of
    those that have only some of them, that with the most, which load_state_dict then refuses."""
    best, n_best = None, 0
    for dataset, model in itertools.product(datasets, models.MODELS):
        with torch.device('meta'):
            thin = models.build(model, data.DATASETS[dataset], 1).state_dict()
            given, first = renamed(state, thin), next(iter(thin))
            if not thin.keys() <= given.keys():
                continue
            width = max(1, len(given[first]) // len(thin[first]))
            fits = models.build(model, data.DATASETS[dataset], width).state_dict()
        if all(given[key].shape == fits[key].shape for key in fits) and len(fits) > n_best:
            best, n_best = {'dataset': dataset, 'model': model, 'width': width}, len(fits)
    if best:
        return data.DATASETS[best['dataset']].settings() | best
    raise ValueError(
        f'these are the parameters of none of {", ".join(models.MODELS)} on '
        f'{", ".join(datasets)}, but {", ".join(map(str, [*state][:3])) or "nothing"}, ...'
    )


def digest(path):
    """SHA-256 of the checkpoint file."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def add_provenance(result, device):
    """Adds the commit, versions, device and date of this session to result['provenance']."""
    here = pathlib.Path(__file__).parent
    command = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    commit = ''
    with contextlib.suppress(OSError):  # there may be no git
        commit = subprocess.run(command, text=True, capture_output=True, cwd=here).stdout.strip()
    name = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    if torch.device(device).type == 'cuda':
        name = torch.cuda.get_device_name(device)
    session = {'commit': commit or 'unknown', 'python': platform.python_version()}
    session |= {'torch': torch.__version__, 'device': name}
    session['date'] = datetime.date.today().isoformat()
    sessions = result.setdefault('provenance', [])
    if session not in sessions:
        sessions.append(session)


def folder_of(path, digest):
    """Where results on a run go: into its folder, or, if that is read-only or `path` a checkpoint
    (of this digest), into evals/."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return pathlib.Path('evals', f'checkpoint_{digest[:10]}')
    if os.access(path, os.W_OK):
        return path
    folder = pathlib.Path('evals', f'{path.resolve().name}_{digest[:10]}')
    print(f'{path} is read-only; results go to {folder}')
    return folder


def output(folder, stem, args, defaults=None):
    """The path of the result `stem` in a folder; in its name are the flags that are given, unless
    they state the `defaults`, name -> value, of what is evaluated."""
    defaults = {'seed': 0} | (defaults or {})
    for name, tag in ('n_examples', 'n'), ('eps', 'eps'), ('seed', 'seed'):
        value = getattr(args, name)
        if value not in (None, defaults.get(name)):
            stem += f'_{tag}{value:.6g}' if name == 'eps' else f'_{tag}{value}'
    return folder / f'{stem}.json'


def resume(path, metadata, device):
    """The result at `path` if it has the same `metadata`, but for paths, else a new one."""
    distributed.agree(f'{path} {metadata}')
    result = load(path) if path.exists() else dict(metadata)
    known = {'data': metadata['data'], **result}  # older results do not say of what data they are
    by_path = 'checkpoint', 'members'  # their digests decide
    others = [key for key in metadata if key not in by_path and known.get(key) != metadata[key]]
    if others:
        print(f'{path} is of other {", ".join(others)}; it is replaced')
        result = dict(metadata)
    add_provenance(result, device)
    return result

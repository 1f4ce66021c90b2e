import csv
import math
import statistics
from unittest import mock

import pytest

import attack
import data
import models
import report
import schedule
import train
from lib import record
from paper import figures, results

ERRORS = [1.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]  # percent: clean, the five attacks, worst
MADE = {'commit': 'abc', 'torch': '2', 'device': 'H100', 'date': '2026-01-02'}
SETTINGS = {
    'pgd100': {'n_iter': 100, 'step_size': 0.01},
    'apgd100_ce': {'n_iter': 100, 'n_restarts': 5, 'loss': 'ce'},
    'apgd100_dlr': {'n_iter': 100, 'n_restarts': 5, 'loss': 'dlr'},
    'square5k': {'n_queries': 5000, 'p_init': 0.8},
}
FEW = SETTINGS | {'square5k': {'n_queries': 100}}
OWN = SETTINGS | {'pgd': {'step_size': 0.5, 'n_iter': 1}}
AUTOATTACK = dict.fromkeys(attack.STANDARD, {})
PERIODIC = '--dataset cifar10 --model vgg --eps-sched linear --periodic --trace 9 --seed 3'
COSINE = '--eps-sched cosine --eps-max 0.6'  # which 1.5 * 0.4 is not
FULL = "Table 1 at the paper's size, fp32: ours / the paper's / deviations between"
OTHER = 'Other runs of lenet on mnist'


def make_run(folder, flags='', errors=ERRORS, settings=SETTINGS, n=10000, classes=10, **change):
    """A finished run of the settings that `flags` mean, with an evaluation of made-up errors."""
    config = train.config_of(['--dataset', 'mnist', *flags.split()]) | change
    folder.mkdir(parents=True)
    record.save(folder / 'config.json', config | {'provenance': [MADE]})
    always = {'eps': config['eps'], 'lr': config['lr'], 'seconds': 60, 'gib': 0.5}
    always |= {'train_robust_error': 0.5, 'robust_error': 0.5, 'clean_error': 0.5}
    log = [always | {'epoch': i + 1, 'loss': 1 / (i + 1)} for i in range(3)]
    for i, row in enumerate(log[-len(config['periods']) :]):
        row |= {key: f'{folder} {key} {i}' for key in ('digest', 'best_digest', 'ema_digest')}
        row['predicted_classes'] = classes
    record.save(folder / 'log.jsonl', log)
    if errors:
        evaluate(folder, errors, settings, n=n)
    return folder


def evaluate(folder, errors=ERRORS, attacks=SETTINGS, file='evaluate', digests=None, **fields):
    """Adds an evaluation to a run: errors in percent when clean, by each attack, in all."""
    config, log = record.load_config(folder), record.load(folder / 'log.jsonl')
    training = {'step_size': config['step_size'], 'n_iter': config['n_iter']}
    attacks = attacks if attacks is AUTOATTACK else {'pgd': training} | attacks
    columns = {
        key: {'error': error / 100, 'settings': attacks.get(key, {})}
        for key, error in zip(['clean', *attacks], errors)
    }
    columns['worst'] = {'error': errors[-1] / 100}
    weights, member = fields.get('weights', 'last'), fields.get('member')
    key = 'digest' if weights == 'last' else f'{weights}_digest'
    digests = digests or [row[key] for row in log if key in row]
    result = {
        'eps': config['eps'],
        'dataset': config['dataset'],
        'digests': digests[member - 1 : member] if member else digests,
        'n': 10000,
        'n_test': 10000,
        'seed': 0,
        'standard': attacks is AUTOATTACK,
        'columns': columns,
        'provenance': [MADE],
    }
    record.save(folder / f'{file}.json', result | fields)


def ensemble(folder, runs, errors, **fields):
    """An evaluation of the last models of `runs`, by AutoAttack, in evals/."""
    members = [f'{run}/period{len(record.load_config(run)["periods"])}.pt' for run in runs]
    digests = [record.load(run / 'log.jsonl')[-1]['digest'] for run in runs]
    evaluate(runs[0], errors, AUTOATTACK, 'moved', digests, members=members, **fields)
    record.save(f'evals/{folder}/evaluate_standard.json', record.load(runs[0] / 'moved.json'))
    (runs[0] / 'moved.json').unlink()


def diverge(folder):
    """Makes a run made by make_run one that diverged."""
    record.save(folder / 'log.jsonl', [])
    record.save(folder / 'diverged.json', {'epoch': 2})
    (folder / 'evaluate.json').unlink()


def analyse(
    folder,
    gradients=(1, 1),
    top=1.0,
    n=50,
    cosine=(0.4, 0.8),
    dead=False,
    fallen=0.5,
    distance=1.0,
    risen=(0.5, 0.5),
    steps=(0.0, 0.1),
):
    """Adds to a run made by make_run what the analyses leave, made up."""
    digest = record.load(folder / 'log.jsonl')[-1]['digest']
    head = {'eps': record.load_config(folder)['eps'], 'digest': digest, 'n': n, 'complete': True}
    row = {'robust_error': 0.5, 'distance': 0.0}
    start, end = ({**row, 'grad_norm': norm} for norm in gradients)
    rows = [start] * 10 + [start | {'robust_error': fallen, 'distance': distance}] * 10 + [end] * 20
    record.save(folder / 'trace.jsonl', [row | {'step': i} for i, row in enumerate(rows)])
    eigen = {'values': [top, -0.5], 'converged': [True, True]}
    record.save(folder / 'hessian.json', head | {'random_losses': [2.0], 'eigen': eigen})
    directions = {'eigenvector': (cosine[0], risen[0]), 'random': (cosine[1], risen[1])}
    points = [
        {'direction': name, 'a': a, 'cosine': value, 'robust_error': error}
        for name, end in directions.items()
        for a, (value, error) in zip(steps, [(1.0, 0.5), *[end] * len(steps)])
    ]
    record.save(folder / 'similarity.json', head | {'points': points})
    grid = [{'a': a, 'b': b, 'loss': a * a + b} for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5)]
    record.save(folder / 'surface.json', head | {'points': grid})
    layers = [{'layer': 'conv1', 'share': 0.25, 'all': dead}]
    record.save(folder / 'dead.json', head | {'predicted_classes': 10, 'layers': layers})
    return folder


def connect(folder, other, barrier):
    """Adds a curve from the run `folder` to the run `other`."""
    ends = [record.load(run / 'log.jsonl')[-1]['digest'] for run in (folder, other)]
    ticks = [{'t': t, 'loss': t, 'robust_error': t} for t in (0, 1)]
    result = {
        'eps': record.load_config(folder)['eps'],
        'digest': ends[0],
        'other': ends[1],
        'n': 50,
        'complete': True,
        'curve': 'bezier',
        'barriers': {'line': 9.0, 'bezier': barrier},
        'points': [tick | {'path': path} for path in ('line', 'bezier') for tick in ticks],
    }
    record.save(folder / 'connect_x.json', result)


def reported(out, *folders):
    """report.main without pictures, and README.md as {heading: [{column: cell} of each row]}."""
    with mock.patch.object(figures, 'draw', return_value={}):
        report.main([*map(str, folders), '--out', str(out)])
    tables = {}
    for section in (out / 'README.md').read_text().split('\n## ')[1:]:
        heading, *lines = section.splitlines()
        table = [line.strip('| ').split(' | ') for line in lines if line[:1] == '|']
        tables[heading] = [dict(zip(table[0], row)) for row in table[2:]]
    return tables


def test_a_row_of_table_1_is_ours_the_papers_and_the_difference_in_deviations(tmp_path):
    for seed, clean in enumerate((1.46, 1.56, 1.96)):
        make_run(tmp_path / f'{seed}', f'--seed {seed}', errors=[clean, *ERRORS[1:]])
    row, *others = reported(tmp_path / 'out', tmp_path)[FULL]
    apart = 0.1 / math.sqrt(statistics.variance([1.46, 1.56, 1.96]) + 0.17**2)
    assert row['clean'] == f'1.66(26) / 1.56(17) / +{apart:.1f}'
    assert row['PGD'] == '8.00(0) / 8.58(89) / -0.7' and row['worst case'] == '13.00(0)'
    assert [row[name] for name in ('seeds', 'minutes', 'gib')] == ['3', '3.0', '0.5']
    assert all(other['clean'].startswith('— / ') for other in others) and len(others) == 14
    assert 'commit abc, torch 2, H100' in (tmp_path / 'out/README.md').read_text()


@pytest.mark.parametrize('flags', ['', COSINE, '--dataset cifar10', PERIODIC])
def test_only_the_papers_own_flags_make_a_row_of_its_table(flags):
    config = train.config_of(['--dataset', 'mnist', *flags.split()]) | {'data': 'abc'}
    periodic = 'yes' if len(config['periods']) > 1 else 'no'
    assert results.differences(config, periodic) == []
    changes = {'lr': 0.5, 'width': 2, 'n_train': 100, 'start': 'eps', 'clock': 'batch', 'eps': 0.2}
    changes |= {'periods': [3], 'lr_warmup': 0.5, 'beta': 6.0, 'n_val': 5, 'ema': 0.9}
    for name, value in (changes | {'restart': ['none']}).items():
        assert name in results.differences(config | {name: value}, periodic)


@pytest.mark.parametrize('change', [{'n': 1000}, {'beta': 6.0}, {'settings': FEW}])
def test_what_is_not_whole_stands_in_the_other_table(tmp_path, change):
    tables = reported(tmp_path / 'out', make_run(tmp_path / 'run', **change))
    assert all(row['seeds'] == '0' for row in tables[FULL])
    assert tables[OTHER][0]['clean'] == '1.00'


def test_a_run_of_before_a_setting_existed_has_its_default(tmp_path):
    config = record.load_config(make_run(tmp_path / 'run'))
    old = {name: config[name] for name in config if name not in ('start', 'restart', 'n_val')}
    record.save(tmp_path / 'run/config.json', old)
    assert reported(tmp_path / 'out', tmp_path)[FULL][0]['seeds'] == '1'


def test_precisions_have_a_table_each(tmp_path):
    for precision in 'fp32', 'bf16':
        make_run(tmp_path / precision, f'--precision {precision}')
    tables = reported(tmp_path / 'out', tmp_path)
    half = tables[FULL.replace('fp32', 'bf16')]
    assert tables[FULL][0]['seeds'] == half[0]['seeds'] == '1' and len(half) == 15


def test_each_way_to_evaluate_is_a_row_of_its_own(tmp_path):
    run = make_run(tmp_path / 'run', '--n-val 9 --ema 0.9 --periodic')
    ways = {'attack seed 1': {'seed': 1}, 'attack precision tf32': {'precision': 'tf32'}}
    ways |= {f'weights {name}': {'weights': name} for name in ('best', 'ema')}
    ways |= {'member 3': {'member': 3}, 'weights best, member 1': {'weights': 'best', 'member': 1}}
    for i, (way, fields) in enumerate(ways.items()):
        evaluate(run, [20 + i], file=f'evaluate_{way}', **fields)
    rows = reported(tmp_path / 'out', run)[OTHER]
    errors = {row['evaluated']: row['clean'] for row in rows}
    expected = {f'10000 images, {way}': f'{20 + i}.00' for i, way in enumerate(ways)}
    assert errors == expected | {'10000 images': '1.00'} and len(rows) == 7


def test_settings_that_differ_stand_in_the_column_flags(tmp_path, monkeypatch):
    wide = data.Dataset(3, 32, 100, None, data.cifar10_settings, denominator=255)
    monkeypatch.setitem(data.DATASETS, 'cifar100', wide)
    monkeypatch.setitem(models.MODELS, 'mlp', models.MODELS['lenet'])
    monkeypatch.setitem(schedule.EPS_SCHEDS, 'sqrt', math.sqrt)
    flags = '--dataset cifar100 --model mlp --eps-sched sqrt --eps 7/255'
    for seed, error in enumerate((40.0, 42.0)):
        run = tmp_path / f'new_s{seed}'
        make_run(run, f'{flags} --seed {seed}', [error, 90], classes=1, beta=6.0)
    for n_train in 100, 200:
        make_run(tmp_path / f'old_{n_train}', f'--n-train {n_train} --lr 0.1')
    make_run(tmp_path / 'old', '--n-train 100 --lr 0.1', settings={'fgsm': {'n_iter': 1}}, seed=1)
    tables = reported(tmp_path / 'out', tmp_path)
    (row,) = tables['Other runs of mlp on cifar100']
    assert (row['runs'], row['flags']) == ('new', '--eps 7/255 --beta 6.0')
    assert row['clean'] == '41.00(141)' and row['note'] == '2 of 2 constant classifiers'
    rows = [(row['runs'], row['flags'], row['FGSM']) for row in tables[OTHER]]
    old = [(f'old_{n}', f'--lr 0.1 --n-train {n}', '—') for n in (100, 200)]
    assert sorted(rows) == [('old', '--lr 0.1 --n-train 100', '9.00'), *old]
    rows = list(csv.DictReader((tmp_path / 'out/table1.csv').open()))
    assert {row['clean']: row['beta'] for row in rows if row['dataset'] == 'cifar100'} == {
        '40.0': '6.0',
        '42.0': '6.0',
    }


@pytest.mark.parametrize('change', [{'n': 1000}, {'settings': FEW}, {'settings': OWN}])
def test_other_images_and_attacks_are_another_row(tmp_path, change):
    make_run(tmp_path / '0', '--n-train 9', n=500)
    make_run(tmp_path / '1', '--n-train 9 --seed 1', **{'n': 500} | change)
    one, other = reported(tmp_path / 'out', tmp_path)[OTHER]
    assert one['seeds'] == other['seeds'] == '1'


def test_copies_count_once_and_different_models_of_a_seed_are_refused(tmp_path):
    run, copy = (make_run(tmp_path / name, '--n-train 9') for name in 'ab')
    with pytest.raises(ValueError, match=f'{run} and {copy} are different models'):
        reported(tmp_path / 'out', tmp_path)
    for file in 'log.jsonl', 'evaluate.json':
        (copy / file).write_bytes((run / file).read_bytes())
    assert reported(tmp_path / 'out', tmp_path, run)[OTHER][0]['seeds'] == '1'


def test_data_that_are_not_said_are_those_of_the_others_unless_these_differ(tmp_path):
    for seed, name in enumerate(('abc', None)):
        make_run(tmp_path / f'{seed}', f'--seed {seed}', **({'data': name} if name else {}))
    evaluate(tmp_path / '1', [1, *[20] * 5], AUTOATTACK, 'evaluate_standard', data='test')
    row = reported(tmp_path / 'out', tmp_path)[FULL][0]
    assert (row['seeds'], row['AutoAttack']) == ('2', '20.00')
    copy = make_run(tmp_path / 'copy', '--seed 0')  # an older one of the first
    for file in 'log.jsonl', 'evaluate.json':
        (copy / file).write_bytes((tmp_path / '0' / file).read_bytes())
    assert reported(tmp_path / 'out', tmp_path)[FULL][0]['seeds'] == '2'
    make_run(tmp_path / 'other', '--n-train 9 --seed 0', data='x')
    make_run(tmp_path / 'another', '--n-train 9 --seed 1', data='y')
    assert [row['seeds'] for row in reported(tmp_path / 'out', tmp_path)[OTHER]] == ['1', '1']


def test_runs_are_found_at_any_depth(tmp_path):
    for name in 'a/b/c', 'a/d':
        make_run(tmp_path / 'ckpts' / name, f'--n-train 9 --seed {len(name)}')
    assert reported(tmp_path / 'out')[OTHER][0]['seeds'] == '2'  # in ckpts/


def test_the_standard_evaluation_is_three_columns(tmp_path):
    run = make_run(tmp_path / 'run', '--n-train 9')
    evaluate(run, [1, 40, 50, 60, 62, 62.5], AUTOATTACK, 'evaluate_standard')
    (row,) = reported(tmp_path / 'out', run)[OTHER]
    shown = [row[name] for name in ('clean', 'worst case', 'two attacks', 'AutoAttack')]
    assert shown == ['1.00', '13.00', '50.00', '62.50']
    result = record.load(run / 'evaluate_standard.json')
    for interrupted, two in (('square', '50.00'), ('apgd_t', '—')):
        del result['columns'][interrupted]
        record.save(run / 'evaluate_standard.json', result)
        (row,) = reported(tmp_path / 'out', run)[OTHER]
        assert (row['two attacks'], row['AutoAttack']) == (two, '—')


def test_the_worst_case_is_that_of_all_five_attacks_or_none(tmp_path):
    (row,) = reported(tmp_path / 'out', make_run(tmp_path / 'run', errors=[1, 8, 9]))[OTHER]
    assert (row['PGD100'], row['worst case']) == ('9.00', '—')


def test_an_attack_of_other_settings_does_not_join_the_others(tmp_path, capsys):
    run = make_run(tmp_path / 'run', '--n-train 9')
    make_run(tmp_path / 'seed1', '--n-train 9 --seed 1')
    evaluate(run, [1, 8], file='evaluate_eps0.4')  # PGD again
    (row,) = reported(tmp_path / 'out', tmp_path)[OTHER]
    assert (row['seeds'], row['worst case']) == ('2', '13.00(0)')
    evaluate(run, [1, 8, 9, 10, 11, 60], FEW, 'evaluate_eps0.4')
    (row,) = reported(tmp_path / 'out', tmp_path)[OTHER]
    assert (row['Square5K'], row['worst case']) == ('12.00(0)', '13.00(0)')
    assert f'left out: {run}/evaluate_eps0.4.json has other' in capsys.readouterr().out


def test_overfitting_is_of_the_last_five_epochs_at_the_target_budget(tmp_path):
    run = make_run(tmp_path / 'run', '--n-train 9')
    *_, row = record.load(run / 'log.jsonl')
    end = row | {'train_robust_error': 0.25, 'robust_error': 0.5}
    row = {name: row[name] for name in row if name != 'digest'} | {'train_robust_error': 0.25}
    ramp = row | {'eps': 0.1, 'train_robust_error': 0}
    first = row | {'robust_error': 1}
    record.save(run / 'log.jsonl', [first, row | {'robust_error': 0.5}, row, ramp, ramp, end])
    (shown,) = reported(tmp_path / 'out', run)[OTHER]
    assert shown['overfitting'] == f'{(25 + 25 + 25) / 3:.1f}'


def test_ensembles_have_a_table(tmp_path):
    runs = [
        make_run(tmp_path / name, f'--dataset cifar10 --seed {len(name)}') for name in ('a', 'ab')
    ]
    ensemble('ensemble_x', runs, [12.5, 50], n=500, precision='tf32', seed=3)
    ensemble('ensemble_y', runs, [75, 76, 77, 78, 79, 79], n=500)
    rows = reported(tmp_path / 'out', tmp_path)['Ensembles']
    expected = {'members': f'{runs[0]}/period1.pt + {runs[1]}/period1.pt', 'dataset': 'cifar10'}
    expected |= {'eps': '8/255', 'test images': '500', 'date': '2026-01-02'}
    unlike = [{'attack seed': '3', 'attack precision': 'tf32', 'clean': '12.50'}]
    unlike += [{'attack seed': '0', 'attack precision': 'fp32', 'clean': '75.00'}]
    errors = [
        {'two attacks': '—', 'AutoAttack': '—'},
        {'two attacks': '77.00', 'AutoAttack': '79.00'},
    ]
    assert rows == [expected | how | error for how, error in zip(unlike, errors)]


def test_a_damaged_file_is_named(tmp_path):
    run = make_run(tmp_path / 'run')
    (run / 'evaluate.json').write_text('{"columns": ')
    with pytest.raises(ValueError, match='run/evaluate.json cannot be read'):
        reported(tmp_path / 'out', run)


def test_what_is_left_out_is_said(tmp_path, capsys):
    """Nothing of it is in a table."""
    flags = '--n-train 9 --periods 1 2 --seed'
    names = 'begun', 'trained', 'retrained', 'eps', 'diverged'
    runs = {name: make_run(tmp_path / name, f'{flags} {i}') for i, name in enumerate(names)}
    ensemble('ensemble_x', [runs['retrained'], runs['eps']], [1, 2, 3, 4, 5, 5])
    (runs['trained'] / 'evaluate.json').unlink()
    record.save(runs['begun'] / 'log.jsonl', record.load(runs['begun'] / 'log.jsonl')[:-1])
    *start, end = record.load(runs['retrained'] / 'log.jsonl')
    record.save(runs['retrained'] / 'log.jsonl', [*start, end | {'digest': 'new'}])
    evaluate(runs['eps'], eps=0.1)
    diverge(runs['diverged'])
    tables = reported(tmp_path / 'out', *runs.values(), 'missing')
    assert [*tables] == [FULL, 'Figures', 'Made with']
    assert all(row['seeds'] == '0' for row in tables[FULL])
    left_out = [line for line in capsys.readouterr().out.splitlines() if 'left out' in line]
    expected = [
        'missing is no folder',
        f'{runs["begun"]} is not finished',
        f'{runs["trained"]} is trained, but not evaluated',
        f'{runs["retrained"]}/evaluate.json is of weights that the run no longer has',
        f'{runs["eps"]}/evaluate.json is at another eps than the run',
        f'{runs["diverged"]} diverged, and no other seed was evaluated',
        'evals/ensemble_x/evaluate_standard.json is of weights that are no longer there',
    ]
    idle = [f'{runs[name]} is trained, but not evaluated' for name in ('retrained', 'eps')]
    assert sorted(left_out) == sorted(f'left out: {line}' for line in [*expected, *idle])


@pytest.mark.parametrize('n_diverged', [1, 2])
def test_a_run_that_diverged_is_always_wrong_where_another_seed_was_evaluated(tmp_path, n_diverged):
    for seed in range(3):
        run = make_run(tmp_path / f'{seed}', f'--seed {seed}')
        if seed < n_diverged:
            diverge(run)
        else:
            evaluate(run, [1, *[20] * 5], AUTOATTACK, 'evaluate_standard')
    row = reported(tmp_path / 'out', tmp_path)[FULL][0]
    assert (row['seeds'], row['note']) == ('3', f'{n_diverged} of 3 diverged')
    mean = (100 * n_diverged + 8 * (3 - n_diverged)) / 3
    assert row['PGD'].startswith(f'{mean:.2f}(') and row['AutoAttack'] != '—'


CONTROLS = {  # label: two attacks' error of seed 0, epochs of training, models at test time
    'A': (70, '8', '1'),
    'B': (62, '8', '1'),
    'C': (64, '8', '1'),
    'D': (66, '8', '3'),
    'F': (61, '4', '1'),
    'L': (68, '8', '1'),
    'G': (60, '8', '3'),
    'H': (58, '8', '3'),
    'I': (59, '8', '3'),
    'P': (63, '8', '3'),
    'Q': (65, '8', '3'),
    'N': (67, '8', '3'),
}
MADE_BY = {  # label: what restarts, weights, member
    'A': ('none', 'last', 3),
    'B': ('none', 'best', 3),
    'C': ('none', 'ema', 3),
    'D': ('none', 'last', None),
    'F': ('eps lr', 'last', 1),
    'L': ('eps lr', 'last', 3),
    'G': ('eps lr', 'last', None),
    'H': ('eps lr', 'best', None),
    'I': ('eps lr', 'ema', None),
    'P': ('lr', 'last', None),
    'Q': ('eps', 'last', None),
}


def control_runs(folder):
    """Three seeds of all controls; every error but those of G and H grows by a point with each."""
    for seed in range(3):
        flags = f'--n-train 9 --seed {seed}'
        for restart in 'none', 'eps lr', 'lr', 'eps':
            run = folder / f'{restart.replace(" ", "_")}_s{seed}'
            more = f'--periods 4 2 2 --n-val 9 --ema 0.9 --restart {restart}'
            make_run(run, f'{flags} {more}', errors=())
            for label, (what, weights, member) in MADE_BY.items():
                error = CONTROLS[label][0] + (label not in 'GH') * seed
                columns = [20, 50, error, 80, 80, 80]
                if what == restart:
                    way = {'weights': weights} | ({'member': member} if member else {})
                    evaluate(run, columns, AUTOATTACK, f'evaluate_{label}', n=500, **way)
        alone = [folder / f'alone{i}_s{seed}' for i in range(3)]
        for i, (run, epochs) in enumerate(zip(alone, (4, 2, 2))):
            make_run(run, f'--n-train 9 --epochs {epochs} --seed {seed + 10 * i}', errors=())
        columns = [20, 50, CONTROLS['N'][0] + seed, 80, 80, 80]
        ensemble(f'ensemble_{seed}', [alone[2], alone[0], alone[1]], columns, n=500)
        ensemble(f'ensemble_eps{seed}', alone, [0] * 6, n=500, eps=0.1)
        ensemble(f'ensemble_tf32{seed}', alone, [0] * 6, n=500, precision='tf32')
    return folder


def test_controls_are_compared_with_pas(tmp_path):
    rows = reported(tmp_path / 'out', control_runs(tmp_path))[
        'Controls: lenet on mnist, constant eps'
    ]
    assert {row['what'][0] for row in rows} == set(CONTROLS) and len(rows) == len(CONTROLS)
    half = 4.302653 / math.sqrt(3)  # Student's t with 2 degrees of freedom, by a deviation of 1
    for row in rows:
        label = row['what'][0]
        error, epochs, n_models = CONTROLS[label]
        spread = 1 if label not in 'GH' else 0
        assert row['two attacks'] == f'{error + spread}.00({100 * spread})'
        shown = [row[name] for name in ('clean', 'AutoAttack', 'seeds', 'epochs', 'models')]
        assert shown == ['20.00(0)', '80.00(0)', '3', epochs, n_models]
        for pas, pas_error in ('G', 60), ('H', 58):
            gain = error + spread - pas_error
            verdict = 'holds' if gain > half else 'inconclusive'
            if gain < -half:
                verdict = 'does not hold'
            interval = f' [{gain - half:.3g}, {gain + half:.3g}]' if spread else ''
            expected = f'{gain}{interval}: {verdict}'
            if label == 'H':
                expected = '-2: inconclusive'  # equal values prove nothing
            if label == pas or (pas == 'H' and label != 'B'):
                expected = '—'
            assert row[f'{pas} gains'] == expected
    gains = figures.gains_of_controls(results.collect([tmp_path]))
    assert {label[0]: round(statistics.mean(points), 9) for label, points, _ in gains} == {
        label: 71 - CONTROLS[label][0] - (label not in 'GH') for label in CONTROLS if label != 'A'
    }


def test_a_report_without_runs_does_not_replace_one(tmp_path):
    reported(tmp_path / 'out', make_run(tmp_path / 'run'))
    before = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    with pytest.raises(ValueError, match='ckpts: no finished run is there'):
        reported(tmp_path / 'out')
    assert {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == before

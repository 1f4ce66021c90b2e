import csv
import math
import pathlib
import statistics
from unittest import mock

import numpy as np
import pytest
from scipy import stats

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
FULL = "Table 1 at the paper's size, fp32: ours / the paper's / deviations between"
OTHER = 'Other runs of lenet on mnist'


def make_run(folder, flags='', errors=ERRORS, settings=SETTINGS, n=10000, classes=10, **change):
    """A finished run of the settings that `flags` mean, with an evaluation of made-up errors."""
    config = train.config_of(['--dataset', 'mnist', *flags.split()]) | change
    record.save(folder / 'config.json', config | {'provenance': [MADE]})
    names = 'train_robust_error', 'robust_error', 'clean_error'
    row = {'eps': config['eps'], 'lr': 1, 'seconds': 60, 'gib': 0.5} | dict.fromkeys(names, 0.5)
    log = [row | {'epoch': i + 1, 'loss': 1 / (i + 1)} for i in range(3)]
    for i, row in enumerate(log[-len(config['periods']) :]):
        row |= {key: f'{folder} {key} {i}' for key in ('digest', 'best_digest', 'ema_digest')}
        row['predicted_classes'] = classes
    record.save(folder / 'log.jsonl', log)
    if errors:
        evaluate(folder, errors, settings=settings, n=n)
    return folder


def evaluate(run, errors, file='evaluate.json', settings=SETTINGS, weights='last', **fields):
    """Adds an evaluation to a run: `errors` when clean, by each attack, and in all."""
    config, log = record.load_config(run), record.load(run / 'log.jsonl')
    attacks = {'pgd': {'step_size': config['step_size'], 'n_iter': config['n_iter']}} | settings
    if fields.get('standard'):
        attacks = dict.fromkeys(attack.STANDARD, {})
    columns = {key: {'error': error / 100} for key, error in zip(['clean', *attacks], errors)}
    columns = {key: columns[key] | {'settings': attacks.get(key)} for key in columns}
    columns['worst'] = {'error': errors[-1] / 100}
    name = 'digest' if weights == 'last' else f'{weights}_digest'
    digests = [row[name] for row in log if name in row]
    if member := fields.get('member'):
        digests = digests[member - 1 : member]
    result = {'eps': config['eps'], 'dataset': config['dataset'], 'weights': weights, 'seed': 0}
    result |= {'digests': digests, 'n': 10000, 'n_test': 10000, 'columns': columns}
    record.save(run / file, result | {'provenance': [MADE]} | fields)


STANDARD = {'file': 'evaluate_standard.json', 'standard': True}


def ensemble(name, runs, errors, **fields):
    """Adds an evaluation by AutoAttack of an ensemble of runs of one period."""
    fields['members'] = [f'{run}/period1.pt' for run in runs]
    fields['digests'] = [record.load(run / 'log.jsonl')[-1]['digest'] for run in runs]
    file = pathlib.Path(f'evals/ensemble_{name}/evaluate.json').absolute()
    evaluate(runs[0], errors, file, standard=True, **fields)


def diverge(run):
    """Makes a finished run one that diverged."""
    record.save(run / 'log.jsonl', [])
    record.save(run / 'diverged.json', {'epoch': 2})
    (run / 'evaluate.json').unlink()


def analyse(run, gradients=(1, 1), top=1.0, n=50, cosine=0.4, risen=0.5, first=(0.5, 1.0)):
    """Adds to a run what the analyses leave; `first` is error and distance of the updates 10-19."""
    digest = record.load(run / 'log.jsonl')[-1]['digest']
    head = {'eps': record.load_config(run)['eps'], 'digest': digest, 'n': n, 'complete': True}
    row = {'robust_error': 0.5, 'distance': 0.0}
    start, end = ({**row, 'grad_norm': norm} for norm in gradients)
    second = start | dict(zip(row, first))
    rows = [start] * 10 + [second] * 10 + [end] * 20
    record.save(run / 'trace.jsonl', [row | {'step': i} for i, row in enumerate(rows)])
    eigen = {'values': [top, -0.5], 'converged': [True, True]}
    record.save(run / 'hessian.json', head | {'random_losses': [2.0], 'eigen': eigen})
    ends = ('eigenvector', cosine, risen), ('random', 0.8, 0.6)
    points = [
        {'direction': direction, 'a': a, 'cosine': cosine, 'robust_error': error}
        for direction, *end in ends
        for a, cosine, error in ((0.0, 1.0, 0.5), (0.1, *end))
    ]
    record.save(run / 'similarity.json', head | {'points': points})
    grid = [{'a': a, 'b': b, 'loss': a * a + b} for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5)]
    record.save(run / 'surface.json', head | {'points': grid})
    layers = [{'layer': 'conv1', 'share': 0.25, 'all': False}]
    record.save(run / 'dead.json', head | {'predicted_classes': 10, 'layers': layers})
    return run


def connect(run, other, barrier):
    """Adds a curve from a run to another."""
    eps, ends = record.load_config(run)['eps'], (f'{path} digest 0' for path in (run, other))
    result = {'eps': eps, 'n': 50, 'complete': True} | dict(zip(('digest', 'other'), ends))
    result |= {'curve': 'bezier', 'barriers': {'line': 9.0, 'bezier': barrier}}
    points = [{'t': t, 'loss': t, 'robust_error': t} for t in (0, 1)]
    points = [point | {'path': path} for path in ('line', 'bezier') for point in points]
    record.save(run / 'connect_x.json', result | {'points': points})


def reported(*folders):
    """report.main without pictures, and its page as {heading: [{column: cell} of each row]}."""
    with mock.patch.object(figures, 'draw', return_value={}):
        report.main([*map(str, folders), '--out', 'out'])
    tables = {}
    for section in pathlib.Path('out/README.md').read_text().split('\n## ')[1:]:
        heading, *lines = section.splitlines()
        table = [line.strip('| ').split(' | ') for line in lines if line[:1] == '|']
        tables[heading] = [dict(zip(table[0], row)) for row in table[2:]]
    return tables


def test_a_row_of_table_1_is_ours_the_papers_and_the_difference_in_deviations(tmp_path):
    for seed, clean in enumerate((1.46, 1.56, 1.96)):
        make_run(tmp_path / f'{seed}', f'--seed {seed}', errors=[clean, *ERRORS[1:]])
    row, *others = reported(tmp_path)[FULL]
    apart = 0.1 / math.sqrt(statistics.variance([1.46, 1.56, 1.96]) + 0.17**2)
    assert row['clean'] == f'1.66(26) / 1.56(17) / +{apart:.1f}'
    assert row['PGD'] == '8.00(0) / 8.58(89) / -0.7' and row['worst case'] == '13.00(0)'
    assert [row[name] for name in ('seeds', 'minutes', 'gib')] == ['3', '3.0', '0.5']
    assert all(other['clean'].startswith('— / ') for other in others) and len(others) == 14
    assert 'commit abc, torch 2, H100' in pathlib.Path('out/README.md').read_text()


PERIODIC = '--dataset cifar10 --model vgg --eps-sched linear --periodic --trace 9 --seed 3'
COSINE = '--eps-sched cosine --eps-max 0.6'  # which 1.5 * 0.4 is not


@pytest.mark.parametrize('flags', ['', COSINE, '--dataset cifar10', PERIODIC])
def test_only_the_papers_own_flags_make_a_row_of_its_table(flags):
    config = train.config_of(['--dataset', 'mnist', *flags.split()]) | {'data': 'abc'}
    periodic = 'yes' if flags == PERIODIC else 'no'
    assert results.differences(config, periodic) == []
    changes = {'lr': 0.5, 'width': 2, 'n_train': 100, 'start': 'eps', 'clock': 'batch', 'eps': 0.2}
    changes |= {'periods': [3], 'lr_warmup': 0.5, 'beta': 6.0, 'n_val': 5, 'restart': ['none']}
    for name, value in changes.items():
        assert name in results.differences(config | {name: value}, periodic)


@pytest.mark.parametrize('change', [{'n': 1000}, {'beta': 6.0}, {'settings': FEW}])
def test_what_is_not_whole_stands_in_the_other_table(tmp_path, change):
    tables = reported(make_run(tmp_path / 'run', **change))
    assert all(row['seeds'] == '0' for row in tables[FULL])
    assert tables[OTHER][0]['clean'] == '1.00'


def test_precisions_have_a_table_each(tmp_path):
    for precision in 'fp32', 'bf16':
        run = make_run(tmp_path / precision, f'--precision {precision}')
    evaluate(run, ERRORS, 'evaluate_seed1.json', seed=1)  # not as in Table 1
    evaluate(run, ERRORS, 'evaluate_tf32.json', precision='tf32')
    tables = reported(tmp_path)
    half = tables[FULL.replace('fp32', 'bf16')]
    assert tables[FULL][0]['seeds'] == half[0]['seeds'] == '1' and len(half) == 15
    assert len(tables[OTHER]) == 2


def test_each_way_to_evaluate_is_a_row_of_its_own(tmp_path):
    run = make_run(tmp_path / 'run', '--n-val 9 --ema 0.9 --periodic')
    ways = {'attack seed 1': {'seed': 1}, 'attack precision tf32': {'precision': 'tf32'}}
    ways |= {f'weights {name}': {'weights': name} for name in ('best', 'ema')}
    ways |= {'member 3': {'member': 3}, 'weights best, member 1': {'weights': 'best', 'member': 1}}
    for i, (way, fields) in enumerate(ways.items()):
        evaluate(run, [20 + i], f'evaluate_{way}.json', **fields)
    errors = {row['evaluated']: row['clean'] for row in reported(run)[OTHER]}
    expected = {f'10000 images, {way}': f'{20 + i}.00' for i, way in enumerate(ways)}
    assert errors == expected | {'10000 images': '1.00'}


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
    make_run(tmp_path / 'old', '--n-train 100 --lr 0.1 --seed 1', settings={'fgsm': {'n_iter': 1}})
    tables = reported(tmp_path)
    (row,) = tables['Other runs of mlp on cifar100']
    assert (row['runs'], row['flags']) == ('new', '--eps 7/255 --beta 6.0')
    assert row['clean'] == '41.00(141)' and row['note'] == '2 of 2 constant classifiers'
    rows = {row['runs']: (row['flags'], row['FGSM']) for row in tables[OTHER]}
    assert rows.pop('old') == ('--lr 0.1 --n-train 100', '9.00')
    assert rows == {f'old_{n}': (f'--lr 0.1 --n-train {n}', '—') for n in (100, 200)}
    rows = list(csv.DictReader(pathlib.Path('out/table1.csv').open()))
    new = [(row['clean'], row['beta']) for row in rows if row['dataset'] == 'cifar100']
    assert new == [('40.0', '6.0'), ('42.0', '6.0')] and len(rows) == 5


@pytest.mark.parametrize('change', [{'n': 1000}, {'settings': FEW}, {'settings': OWN}])
def test_other_images_and_attacks_are_another_row(tmp_path, change):
    make_run(tmp_path / '0', '--n-train 9', n=500)
    make_run(tmp_path / '1', '--n-train 9 --seed 1', **{'n': 500} | change)
    one, other = reported(tmp_path)[OTHER]
    assert one['seeds'] == other['seeds'] == '1'


def copy(run, other):
    """The weights and results of a run in the place of those of another."""
    for file in 'log.jsonl', 'evaluate.json':
        (other / file).write_bytes((run / file).read_bytes())


def test_copies_count_once_and_different_models_of_a_seed_are_refused(tmp_path):
    run, other = (make_run(tmp_path / name, '--n-train 9') for name in 'ab')
    with pytest.raises(ValueError, match=f'{run} and {other} are different models'):
        reported(tmp_path)
    copy(run, other)
    assert reported(tmp_path, run)[OTHER][0]['seeds'] == '1'


def test_older_results_are_on_the_data_of_the_others_unless_these_differ(tmp_path):
    new = make_run(tmp_path / 'new', '--n-train 9', data='abc')
    evaluate(new, ERRORS, data='test')
    old = make_run(tmp_path / 'old', '--n-train 9 --seed 1')
    config = record.load_config(old)
    del config['start'], config['restart'], config['n_val']  # it has their defaults
    record.save(old / 'config.json', config)
    evaluate(old, [1, *[20] * 5], data='test', **STANDARD)
    copy(new, make_run(tmp_path / 'copy', '--n-train 9'))
    make_run(tmp_path / 'silent', '--n-train 9 --seed 3')
    (row,) = reported(tmp_path)[OTHER]
    assert (row['seeds'], row['AutoAttack']) == ('3', '20.00')
    make_run(tmp_path / 'other', '--n-train 9 --seed 2', data='other')
    (tmp_path / 'copy/config.json').unlink()
    assert sorted(row['seeds'] for row in reported(tmp_path)[OTHER]) == ['1', '1', '2']


def test_runs_are_found_at_any_depth(tmp_path):
    for name in 'a/b/c', 'a/d':
        make_run(tmp_path / 'ckpts' / name, f'--n-train 9 --seed {len(name)}')
    assert reported()[OTHER][0]['seeds'] == '2'  # in ckpts/


def test_a_column_of_several_attacks_takes_all_of_them(tmp_path):
    run = make_run(tmp_path / 'run', '--n-train 9')
    make_run(tmp_path / 'four', '--n-train 5', ERRORS[:5])
    evaluate(run, [1, 40, 50, 60, 62, 62.5], **STANDARD)
    names = 'clean', 'worst case', 'two attacks', 'AutoAttack'
    rows = [[row[name] for name in names] for row in reported(tmp_path)[OTHER]]
    assert rows == [['1.00', '—', '—', '—'], ['1.00', '13.00', '50.00', '62.50']]
    evaluate(run, [1, 40, 50, 60], **STANDARD)  # it was interrupted
    assert [reported(run)[OTHER][0][name] for name in names] == ['1.00', '13.00', '50.00', '—']
    evaluate(run, [1, 40], **STANDARD)
    assert [reported(run)[OTHER][0][name] for name in names] == ['1.00', '13.00', '—', '—']


def test_a_further_attack_of_one_run_splits_no_row_and_is_not_in_the_worst_case(tmp_path):
    runs = [make_run(tmp_path / f'run_s{seed}', f'--n-train 9 --seed {seed}') for seed in (0, 1)]
    evaluate(runs[0], [*ERRORS[:-1], 14, 15], settings=SETTINGS | {'mine': {}})
    robust = {
        key: np.arange(100) >= error for key, error in zip(['clean', *results.ATTACKS], ERRORS)
    }
    record.save(runs[0] / 'evaluate.npz', robust | {'mine': np.arange(100) >= 14})
    (row,) = reported(tmp_path)[OTHER]
    assert (row['seeds'], row['MINE'], row['worst case']) == ('2', '14.00', '12.50(71)')


def test_an_attack_of_other_settings_does_not_join_the_others(tmp_path, capsys):
    run = make_run(tmp_path / 'run', '--n-train 9')
    make_run(tmp_path / 'seed1', '--n-train 9 --seed 1')
    for errors, settings in ([1, 8], SETTINGS), ([1, 8, 9, 10, 11, 60, 60], FEW):
        evaluate(run, errors, 'evaluate_eps0.4.json', settings)  # PGD again; another Square5K
        (row,) = reported(tmp_path)[OTHER]
        assert (row['seeds'], row['Square5K'], row['worst case']) == ('2', '12.00(0)', '13.00(0)')
    assert f'left out: {run}/evaluate_eps0.4.json has other' in capsys.readouterr().out


def test_overfitting_is_of_the_last_five_epochs_at_the_target_budget(tmp_path):
    run = make_run(tmp_path / 'run', '--n-train 9')
    *_, end = record.load(run / 'log.jsonl')
    end |= {'train_robust_error': 0.25}
    row = {name: end[name] for name in end if name != 'digest'}
    first, ramp = row | {'robust_error': 1}, row | {'eps': 0.1, 'train_robust_error': 0}
    record.save(run / 'log.jsonl', [first, row, row, ramp, ramp, end])
    assert reported(run)[OTHER][0]['overfitting'] == '25.0'


def test_ensembles_have_a_table(tmp_path):
    flags = '--dataset cifar10 --seed'
    runs = [make_run(tmp_path / f'{seed}', f'{flags} {seed}') for seed in (0, 1)]
    ensemble('x', runs, [12.5, 50], n=500, precision='tf32', seed=3)
    ensemble('y', runs, [75, 76, 77, 78, 79, 79], n=500)
    expected = {'members': f'{runs[0]}/period1.pt + {runs[1]}/period1.pt', 'dataset': 'cifar10'}
    expected |= {'eps': '8/255', 'test images': '500', 'date': '2026-01-02'}
    names = 'attack seed', 'attack precision', 'clean', 'two attacks', 'AutoAttack'
    rows = ('3', 'tf32', '12.50', '—', '—'), ('0', 'fp32', '75.00', '77.00', '79.00')
    assert reported(tmp_path)['Ensembles'] == [expected | dict(zip(names, row)) for row in rows]


def test_a_damaged_file_is_named(tmp_path):
    (make_run(tmp_path / 'run') / 'evaluate.json').write_text('{"columns": ')
    with pytest.raises(ValueError, match='run/evaluate.json cannot be read'):
        reported(tmp_path)


def test_what_is_in_no_table_is_said(tmp_path, capsys):
    names = 'begun', 'trained', 'retrained', 'eps', 'diverged'
    runs = {name: make_run(tmp_path / name, f'--periods 1 2 --lr {len(name)}') for name in names}
    ensemble('x', [runs['retrained'], runs['eps']], [1, 2, 3, 4, 5, 5])
    (runs['trained'] / 'evaluate.json').unlink()
    *start, end = record.load(runs['begun'] / 'log.jsonl')
    record.save(runs['begun'] / 'log.jsonl', start)
    *start, end = record.load(runs['retrained'] / 'log.jsonl')
    record.save(runs['retrained'] / 'log.jsonl', [*start, end | {'digest': 'new'}])
    evaluate(runs['eps'], ERRORS, eps=0.1)
    diverge(runs['diverged'])
    tables = reported(*runs.values(), 'missing')
    assert [*tables] == [FULL, 'Figures', 'Made with'] and {r['seeds'] for r in tables[FULL]} == {
        '0'
    }
    said = {line[10:] for line in capsys.readouterr().out.splitlines() if 'left out' in line}
    idle = {f'{runs[name]} is trained, but not evaluated' for name in names[1:4]}
    assert said == idle | {
        'missing is no folder',
        f'{runs["begun"]} is not finished',
        f'{runs["retrained"]}/evaluate.json is of weights that the run no longer has',
        f'{runs["eps"]}/evaluate.json is at another eps than the run',
        f'{runs["diverged"]} diverged, and no other seed was evaluated',
        'evals/ensemble_x/evaluate.json has a member that is no model of these runs',
    }


def test_a_run_that_diverged_is_always_wrong_where_another_seed_was_evaluated(tmp_path):
    for seed in range(3):
        evaluate(make_run(tmp_path / f'{seed}', f'--seed {seed}'), [1, *[20] * 5], **STANDARD)
    diverge(tmp_path / '1')
    row = reported(tmp_path)[FULL][0]
    assert (row['seeds'], row['note']) == ('3', '1 of 3 diverged')
    assert row['PGD'].startswith('38.67(5312)')  # (8 + 100 + 8) / 3
    assert row['AutoAttack'].startswith('46.67')


# label: what restarts, weights, member; error of seed 0, epochs of training, models at test time
CONTROLS = {
    'A': ('none', 'last', 3, 70, '8', '1'),
    'B': ('none', 'best', 3, 62, '8', '1'),
    'C': ('none', 'ema', 3, 64, '8', '1'),
    'D': ('none', 'last', None, 66, '8', '3'),
    'F': ('eps lr', 'last', 1, 61, '4', '1'),
    'L': ('eps lr', 'last', 3, 68, '8', '1'),
    'G': ('eps lr', 'last', None, 60, '8', '3'),
    'H': ('eps lr', 'best', None, 58, '8', '3'),
    'I': ('eps lr', 'ema', None, 57, '8', '3'),
    'P': ('lr', 'last', None, 63, '8', '3'),
    'Q': ('eps', 'last', None, 65, '8', '3'),
    'N': (None, None, None, 67, '8', '3'),
}


def control_runs(folder):
    """Three seeds of all controls; errors grow by a point with each seed, but for those of PAS."""
    for seed in range(3):
        flags = f'--n-train 9 --seed {seed}'
        for label, (restart, weights, member, error, *_) in CONTROLS.items():
            errors = [20, 50, error + seed * (label not in 'GH'), 80, 80, 80]
            if restart:
                run = folder / f'{restart}_s{seed}'
                flags = f'--n-train 9 --seed {seed} --periods 4 2 2 --n-val 9 --restart {restart}'
                make_run(run, flags, errors=())
                how = {'member': member} if member else {}
                file = f'evaluate_{label}.json'
                evaluate(run, errors, file, weights=weights, n=500, standard=True, **how)
        alone = [folder / f'alone{i}_s{seed}' for i in range(4)]
        for i, epochs in enumerate((2, 4, 2, 4)):  # the longest gives the seed
            make_run(alone[i], f'--n-train 9 --epochs {epochs} --seed {seed + 10 * ((i - 1) % 4)}')
        ensemble(f'{seed}', alone[:3], errors, n=500)
        ensemble(f'{seed}_long', alone[1:], [0] * 6, n=500)  # of 10 epochs
        ensemble(f'{seed}_eps', alone[:3], [0] * 6, n=500, eps=0.1)
        ensemble(f'{seed}_tf32', alone[:3], [0] * 6, n=500, precision='tf32')
    return folder


def test_controls_are_compared_with_pas(tmp_path):
    tables = reported(control_runs(tmp_path))
    assert not any('--restart' in heading for heading in tables)  # the rows differ in it
    (rows,) = (t for heading, t in tables.items() if heading.startswith('Controls: lenet on mnist'))
    assert [row['what'][0] for row in rows] == [*CONTROLS]
    half = 4.302653 / math.sqrt(3)  # Student's t with 2 degrees of freedom, deviations of 1 point
    means = {label: values[3] + (label not in 'GH') for label, values in CONTROLS.items()}
    gains = [mean - 60 for label, mean in means.items() if label not in 'GH'] + [5]  # 5: H over B
    p = sorted(2 * stats.t.sf(abs(gain) * math.sqrt(3), 2) for gain in gains)
    standing = [
        value for i, value in enumerate(p) if all(p[k] <= 0.05 / (11 - k) for k in range(i + 1))
    ]

    def verdict(gain):
        low, high = gain - half, gain + half
        text = 'holds' if low > 0 else 'does not hold' if high < 0 else 'inconclusive'
        text += f', {gain} [{low:.3g}, {high:.3g}]'
        decided = not low < 0 < high
        alone = 2 * stats.t.sf(abs(gain) * math.sqrt(3), 2)
        return text + ', uncorrected' * (decided and alone not in standing)

    for row in rows:
        *_, epochs, n_models = CONTROLS[label := row['what'][0]]
        assert row['two attacks'] == f'{means[label]}.00({100 * (label not in "GH")})'
        shown = [row[name] for name in ('clean', 'AutoAttack', 'seeds', 'epochs', 'models')]
        assert shown == ['20.00(0)', '80.00(0)', '3', epochs, n_models]
        equal = {'G': '—', 'H': 'inconclusive, -2'}  # equal values prove nothing
        assert row['G gains'] == (equal.get(label) or verdict(means[label] - 60))
        assert row['H gains'] == (verdict(5) if label == 'B' else '—')
    assert 'uncorrected' in str(rows) and standing
    points = figures.gains_of_controls(results.collect([tmp_path]))
    assert {label[0]: round(statistics.mean(gains), 9) for label, gains, _ in points} == {
        label: 71 - CONTROLS[label][3] - (label not in 'GH') for label in CONTROLS if label != 'A'
    }


def test_a_report_without_runs_does_not_replace_one(tmp_path):
    reported(make_run(tmp_path / 'run'))
    before = {path: path.read_bytes() for path in pathlib.Path('out').iterdir()}
    with pytest.raises(ValueError, match='ckpts: no finished run is there'):
        reported()
    assert {path: path.read_bytes() for path in pathlib.Path('out').iterdir()} == before

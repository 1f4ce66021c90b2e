import csv
import itertools
import math
import re
import statistics

import pytest

import attack
import data
import report
import train
from lib import record
from paper import tables

ERRORS = [1.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]  # percent: clean, the five attacks, worst
MADE = {'commit': 'abc', 'torch': '2', 'device': 'H100'}
SETTINGS = {
    'pgd100': {'n_iter': 100, 'step_size': 0.01},
    'apgd100_ce': {'n_iter': 100, 'n_restarts': 5, 'loss': 'ce'},
    'apgd100_dlr': {'n_iter': 100, 'n_restarts': 5, 'loss': 'dlr'},
    'square5k': {'n_queries': 5000, 'p_init': 0.8},
}
PERIODIC = '--dataset cifar10 --model vgg --eps-sched linear --periodic --trace 9 --seed 3'
FEW = SETTINGS | {'square5k': {'n_queries': 100}}
REFUSED = [('budget', '--lr 0.5'), ('rate', '--weight-decay 0.1'), ('width', '--eps-sched linear')]


def make_run(folder, flags='', n=10000, errors=ERRORS, settings=SETTINGS, classes=10, **change):
    """A finished run of the settings that `flags` mean, with an evaluation of made-up errors."""
    args = train.parser().parse_args(['--dataset', 'mnist', *flags.split()])
    config = vars(train.settings(args)) | change
    folder.mkdir(parents=True)
    record.save(folder / 'config.json', config | {'provenance': [MADE]})
    row = {'eps': config['eps'], 'seconds': 60, 'gib': 0.5}
    rows = [row | {'epoch': i + 1, 'loss': 1 / (i + 1)} for i in range(3)]
    digests = [f'{folder} {i}' for i, _ in enumerate(config['periods'])]
    ends = [{'digest': digest} for digest in digests] + [{}, {}]
    rows = [row | end | {'predicted_classes': classes} for row, end in zip(rows, ends)]
    record.save(folder / 'log.jsonl', rows)
    attacks = {'pgd': {'step_size': config['step_size'], 'n_iter': config['n_iter']}} | settings
    keys = ['clean', *attacks, 'worst'][: len(errors)]
    columns = {key: {'error': error / 100} for key, error in zip(keys, errors)}
    columns |= {key: columns[key] | {'settings': attacks[key]} for key in attacks if key in columns}
    result = {'eps': config['eps'], 'dataset': config['dataset'], 'digests': digests, 'n': n}
    result |= {'n_test': 10000, 'seed': 0, 'columns': columns, 'provenance': [MADE]}
    record.save(folder / 'evaluate.json', result)
    return str(folder)


def analyse(
    folder,
    gradients=(1, 1),
    top=1.0,
    n=50,
    cosine=(0.4, 0.8),
    dead=False,
    scale=2.0,
    fallen=0.5,
    distance=1.0,
    risen=(0.5, 0.5),
):
    """Adds to a run made by make_run what the analyses leave, made up."""
    config, digest = record.load_config(folder), f'{folder} 0'
    head = {'eps': config['eps'], 'digest': digest, 'n': n, 'complete': True}
    row = {'robust_error': 0.5, 'distance': 0.0}
    start, end = ({**row, 'grad_norm': g} for g in gradients)
    rows = [start] * 10 + [start | {'robust_error': fallen, 'distance': distance}] * 10 + [end] * 20
    rows = [row | {'step': step} for step, row in enumerate(rows)]
    record.save(f'{folder}/trace.jsonl', rows)
    eigen = {'values': [top, -0.5], 'converged': [True, True]}
    hessian = {'loss': 0.25, 'robust_error': 0.125, 'random_losses': [scale], 'eigen': eigen}
    record.save(f'{folder}/hessian.json', head | hessian)
    directions = {'eigenvector': (cosine[0], risen[0]), 'random': (cosine[1], risen[1])}
    points = [
        {'direction': name, 'a': a, 'cosine': value, 'robust_error': error}
        for name, end in directions.items()
        for a, (value, error) in ((0.0, (1.0, 0.5)), (0.1, end))
    ]
    record.save(f'{folder}/similarity.json', head | {'points': points})
    grid = [{'a': a, 'b': b, 'loss': a * a + b} for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5)]
    record.save(f'{folder}/surface.json', head | {'points': grid})
    layers = [{'layer': 'conv1', 'share': 0.25, 'all': dead}]
    record.save(f'{folder}/dead.json', head | {'predicted_classes': 10, 'layers': layers})
    return folder


def connect(folder, other, barrier):
    """Adds a curve from the run `folder` to the run `other`."""
    ends = [f'{run} 0' for run in (folder, other)]
    ticks = [{'t': t, 'loss': t, 'robust_error': t} for t in (0, 1)]
    points = [tick | {'path': path} for path in ('line', 'bezier') for tick in ticks]
    head = {'eps': record.load_config(folder)['eps'], 'digest': ends[0], 'other': ends[1], 'n': 50}
    head['complete'] = True
    head |= {'curve': 'bezier', 'barriers': {'line': 9.0, 'bezier': barrier}, 'points': points}
    record.save(f'{folder}/connect_x.json', head)


def reported(out, *arguments):
    """report.main, and the tables of its table1.md: [[{heading: cell} of each row] of each]."""
    report.main([*map(str, arguments), '--out', str(out)])
    return read_tables(out / 'table1.md')


def read_tables(path):
    found, text = [], path.read_text().splitlines()
    for is_table, lines in itertools.groupby(text, lambda line: line[:1] == '|'):
        if is_table:
            head, _, *rows = ([c.strip() for c in line.split('|')[1:-1]] for line in lines)
            found.append([dict(zip(head, row)) for row in rows])
    return found


def test_a_row_of_table_1_is_ours_the_papers_and_the_difference_in_deviations(tmp_path):
    for seed, clean in enumerate((1.46, 1.56, 1.96)):
        make_run(tmp_path / f'{seed}', f'--seed {seed}', errors=[clean, *ERRORS[1:]])
    (full,) = reported(tmp_path / 'out', *(tmp_path / str(seed) for seed in range(3)))
    apart = 0.1 / math.sqrt(statistics.variance([1.46, 1.56, 1.96]) + 0.17**2)
    assert full[0]['clean'] == f'1.66(26) / 1.56(17) / +{apart:.1f}'
    assert full[0]['PGD'] == '8.00(0) / 8.58(89) / -0.7'
    assert [full[0][name] for name in ('worst case', 'runs', 'minutes', 'GiB')] == [
        '13.00(0)',
        '3',
        '3.0',
        '0.5',
    ]
    assert all(row['clean'].startswith('— / ') for row in full[1:]) and len(full) == 15
    assert 'commit abc, torch 2, H100' in (tmp_path / 'out/table1.md').read_text()


COSINE = '--eps-sched cosine --eps-max 0.6'  # which 1.5 * 0.4 is not


@pytest.mark.parametrize('flags', ['', COSINE, '--dataset cifar10', PERIODIC])
def test_the_papers_own_flags_are_rows_of_its_table(flags):
    args = train.parser().parse_args(['--dataset', 'mnist', *flags.split()])
    config = vars(train.settings(args))
    assert tables.of_paper(config)
    assert tables.of_paper({k: v for k, v in config.items() if k != 'start'})  # an older one
    changes = {'lr': 0.5, 'width': 2, 'n_train': 100, 'start': 'eps', 'clock': 'batch', 'eps': 0.2}
    changes |= {'periods': [3], 'lr_warmup': 0.5, 'beta': 6.0, 'eps_sched': 'sqrt', 'dataset': 'x'}
    for name, value in changes.items():
        assert not tables.of_paper(config | {name: value})


@pytest.mark.parametrize('change', [{'n': 1000}, {'beta': 6.0}, {'settings': FEW}])
def test_what_is_not_whole_stands_in_the_other_table(tmp_path, change):
    run = make_run(tmp_path / 'run', **change)
    full, other = reported(tmp_path / 'out', run)
    assert all(row['runs'] == '0' for row in full) and other[0]['clean'] == '1.00'


def test_precisions_have_a_table_each(tmp_path):
    runs = [make_run(tmp_path / p, f'--precision {p}') for p in ('fp32', 'bf16')]
    full, half = reported(tmp_path / 'out', *runs)
    assert full[0]['runs'] == half[0]['runs'] == '1' and len(half) == 15


def test_evaluations_with_another_seed_or_precision_have_a_table_each(tmp_path):
    run = make_run(tmp_path / 'run')
    result = record.load(tmp_path / 'run/evaluate.json')
    for name, more in ('seed1', {'seed': 1}), ('tf32', {'precision': 'tf32'}):
        record.save(tmp_path / f'run/evaluate_{name}.json', result | more)
    found = reported(tmp_path / 'out', run)
    assert [rows[0]['runs'] for rows in found] == ['1', '1', '1']
    text = (tmp_path / 'out/table1.md').read_text()
    assert 'fp32 (attacks in fp32, seed 1): ours' in text and '(attacks in tf32, seed 0)' in text


def test_settings_that_differ_are_columns_and_the_others_are_said_once(tmp_path, monkeypatch):
    wide = data.Dataset(3, 32, 100, None, data.cifar10_settings, denominator=255)
    monkeypatch.setitem(data.DATASETS, 'cifar100', wide)
    new = {'dataset': 'cifar100', 'model': 'mlp', 'eps_sched': 'sqrt', 'eps': 8 / 255, 'beta': 6.0}
    for seed, error in enumerate((40.0, 42.0)):
        make_run(tmp_path / f'new{seed}', f'--seed {seed}', errors=[error, 90], classes=1, **new)
    old = [make_run(tmp_path / f'old{n}', f'--n-train {n} --lr 0.1') for n in (100, 200)]
    make_run(tmp_path / 'old', '--n-train 100 --lr 0.1', settings={'fgsm': {'n_iter': 1}}, seed=1)
    runs = tmp_path / 'new0', tmp_path / 'new1', *old, tmp_path / 'old'
    _, (row,), rows = reported(tmp_path / 'out', *runs)
    assert row['clean'] == '41.00(141)' and row['note'] == '2 of 2 constant classifiers'
    found = [(row['n_train'], row['FGSM']) for row in rows]
    assert found == [('100', '—'), ('200', '—'), ('100', '9.00')]
    text = (tmp_path / 'out/table1.md').read_text()
    ours, theirs = re.findall('Other runs of (.*)', text)
    assert ours.startswith('mlp on cifar100: defaults, but for eps_sched sqrt, ')
    assert 'beta 6.0' in ours
    assert theirs.startswith('lenet on mnist: defaults, but for width 16, lr 0.1, test images')
    assert 'n_train' not in theirs and 'batch_size' not in text
    rows = list(csv.DictReader((tmp_path / 'out/table1.csv').open()))
    assert len(rows) == 5 and rows[1]['beta'] == '6.0' and float(rows[1]['clean']) == 42


OWN = SETTINGS | {'pgd': {'step_size': 0.5, 'n_iter': 1}}


@pytest.mark.parametrize('change', [{'n': 1000}, {'settings': FEW}, {'settings': OWN}])
def test_other_images_and_attacks_are_another_row(tmp_path, change):
    runs = [make_run(tmp_path / '0', '--n-train 9', n=500)]
    runs.append(make_run(tmp_path / '1', '--n-train 9 --seed 1', **{'n': 500} | change))
    one, other = reported(tmp_path / 'out', *runs)[1]
    assert one['runs'] == other['runs'] == '1'
    column = {'n': 'test images', 'settings': 'PGD by'}[[*change][0]]
    assert change == {'settings': FEW} or one[column] != other[column]


def test_the_same_settings_and_seed_count_once(tmp_path):
    runs = [make_run(tmp_path / name, '--n-train 9') for name in 'ab']
    assert reported(tmp_path / 'out', *runs, runs[0])[1][0]['runs'] == '1'


def test_runs_are_found_at_any_depth(tmp_path):
    for name in 'a/b/c', 'a/d':
        make_run(tmp_path / 'ckpts' / name, f'--n-train 9 --seed {len(name)}')
    assert reported(tmp_path / 'out')[1][0]['runs'] == '2'  # in ckpts/


def test_the_standard_evaluation_is_a_column(tmp_path):
    run = make_run(tmp_path / 'run', '--n-train 9')
    result = record.load(tmp_path / 'run/evaluate.json') | {'standard': True}
    keys = ['clean', *attack.STANDARD]
    columns = {key: {'error': 0.5, 'settings': {}} for key in keys} | {'worst': {'error': 0.625}}
    path = tmp_path / 'run/evaluate_standard.json'
    record.save(path, result | {'columns': columns})
    (row,) = reported(tmp_path / 'out', run)[1]
    assert row['AutoAttack'] == '62.50' and row['worst case'] == '13.00' and row['clean'] == '1.00'
    del columns['square']  # it was interrupted
    record.save(path, result | {'columns': columns})
    assert 'AutoAttack' not in reported(tmp_path / 'out', run)[1][0]


@pytest.mark.parametrize('classes, note', [(10, ''), (1, '3 of 3 baselines untrained')])
def test_a_gain_has_an_interval_for_each_error_that_all_seeds_have(tmp_path, classes, note):
    for seed, gain in enumerate((1, 2, 3)):
        flags, more = f'--seed {seed} --n-train 9', {'eps_sched': 'sqrt', 'eps_max': 0.8}
        errors = [4, *[20] * 5, 22 + gain]
        make_run(tmp_path / f'c{seed}', flags, errors=errors, classes=classes)
        errors = [2 - (seed == 2), *[20 - 5 * (i == seed) for i in range(5)], 22]
        make_run(tmp_path / f's{seed}', flags, errors=errors, **more)
    for run in tmp_path / 'c2', tmp_path / 's2':
        result = record.load(run / 'evaluate.json') | {'standard': True}
        columns = dict.fromkeys(['clean', *attack.STANDARD, 'worst'], {'error': 0.5})
        record.save(run / 'evaluate_standard.json', result | {'columns': columns})
    (row,) = reported(tmp_path / 'out', tmp_path)[-1]
    clean = '2.33 (0.899 to 3.77)'  # t = 4.303 with 2 degrees of freedom: 4.303 / 3 = 1.434
    assert row == {
        'change': 'eps_sched constant to sqrt',
        'experiment': 'mnist lenet of width 16, eps 0.4',
        'robust': '1',
        'worst case': '2 (-0.484 to 4.48)',  # 4.303 / sqrt(3) = 2.484
        'clean': clean if note else f'**{clean}**',
        'seeds': '3',
        'note': note,
    }


def test_overfitting_is_of_the_last_five_epochs_at_the_target_budget(tmp_path):
    run = make_run(tmp_path / 'run', '--n-train 9')
    first, *_, row = record.load(f'{run}/log.jsonl')
    first |= {'train_robust_error': 0.25, 'robust_error': 1}
    row |= {'train_robust_error': 0.25, 'robust_error': 0.5}
    ramp = row | {'eps': 0.1, 'train_robust_error': 0}
    record.save(f'{run}/log.jsonl', [first, row, row, ramp, ramp, row])
    assert reported(tmp_path / 'out', run)[1][0]['overfitting'] == '25.0'


def test_ensembles_have_a_table(tmp_path):
    result = {'members': ['a', 'b'], 'dataset': 'cifar10', 'eps': 8 / 255, 'n': 500}
    columns = {'clean': {'error': 0.125}, 'apgd100_ce': {'error': 0.5}}
    record.save('evals/ensemble_x/evaluate.json', result | {'columns': columns})
    standard = {key: {'error': 0.75} for key in ('clean', *attack.STANDARD, 'worst')}
    result_2 = result | {'standard': True, 'columns': standard}
    record.save('evals/ensemble_x/evaluate_standard.json', result_2)
    rows = reported(tmp_path / 'out', make_run(tmp_path / 'run'))[-1]
    expected = {'members': 'a + b', 'dataset': 'cifar10', 'eps': '8/255', 'test images': '500'}
    assert rows[0] == expected | {'clean': '12.50', 'APGD100-CE': '50.00', 'AutoAttack': '—'}
    assert rows[1] == expected | {'clean': '75.00', 'APGD100-CE': '—', 'AutoAttack': '75.00'}


def test_a_damaged_file_is_named(tmp_path):
    run = make_run(tmp_path / 'run')
    (tmp_path / 'run/evaluate.json').write_text('{"columns": ')
    with pytest.raises(ValueError, match='run/evaluate.json cannot be read'):
        reported(tmp_path / 'out', run)


def test_an_evaluation_of_an_earlier_training_does_not_count(tmp_path):
    run = make_run(tmp_path / 'run', '--n-train 9')
    assert len(reported(tmp_path / 'out', run)) == 2
    log = record.load(tmp_path / 'run/log.jsonl')
    record.save(tmp_path / 'run/log.jsonl', [{**row, 'digest': 'new'} for row in log[:1]])
    assert len(reported(tmp_path / 'out', run)) == 1


def test_runs_without_a_result_are_named(tmp_path, capsys):
    for name in 'begun', 'trained':
        make_run(tmp_path / name, f'--n-train 9 --periods 1 {len(name)}')
        (tmp_path / name / 'evaluate.json').unlink()
    record.save(tmp_path / 'begun/log.jsonl', record.load(tmp_path / 'begun/log.jsonl')[:1])
    reported(tmp_path / 'out', tmp_path)
    *_, unfinished, idle, _ = capsys.readouterr().out.split('\n')
    assert unfinished == f'not finished: {tmp_path}/begun'
    assert idle == f'trained, but not evaluated: {tmp_path}/trained'


def test_a_report_without_runs_does_not_replace_one(tmp_path):
    assert len(reported(tmp_path / 'out')[0]) == 15
    reported(tmp_path / 'out', make_run(tmp_path / 'run'))
    before = (tmp_path / 'out/table1.md').read_bytes()
    with pytest.raises(ValueError, match='no run to report on'):
        reported(tmp_path / 'out')
    assert (tmp_path / 'out/table1.md').read_bytes() == before


@pytest.mark.parametrize('kind, flags', REFUSED)
def test_a_study_refuses_runs_that_differ_in_more_than_it_varies(tmp_path, kind, flags):
    name, value = flags[2:].replace('-', '_').split()
    runs = [make_run(tmp_path / 'a'), make_run(tmp_path / 'b', flags)]
    with pytest.raises(ValueError, match=f'--{kind}: .*b has {name} {value}, .*a '):
        reported(tmp_path / 'out', f'--{kind}', *runs)
    twin = make_run(tmp_path / 'c', '--trace 5')
    with pytest.raises(ValueError, match='a and .*c both have --seed 0 --eps '):
        reported(tmp_path / 'out', f'--{kind}', runs[0], twin)

"""The controls of the claim on periods: what other uses of the same epochs reach."""

import pandas as pd

from paper.results import alike

CONTROLS = [  # what restarts, weights, member: what it is, epochs of training, models at test time
    ('none', 'last', 3, 'A: one run, last epoch', 1, 1),
    ('none', 'best', 3, 'B: the same, epoch chosen on held-out images', 1, 1),
    ('none', 'ema', 3, 'C: average of its weights', 1, 1),
    ('none', 'last', 'all', "D: its snapshots at the ends of PAS's periods", 1, 3),
    ('eps lr', 'last', 1, 'F: PAS, first member alone', 1 / 2, 1),
    ('eps lr', 'last', 3, 'L: PAS, last member alone', 1, 1),
    ('eps lr', 'last', 'all', 'G: PAS', 1, 3),
    ('eps lr', 'best', 'all', 'H: PAS, each member chosen on held-out images', 1, 3),
    ('eps lr', 'ema', 'all', 'I: PAS, average of the weights of each period', 1, 3),
    ('lr', 'last', 'all', 'P: only the learning rate restarts', 1, 3),
    ('eps', 'last', 'all', 'Q: only eps restarts', 1, 3),
]


def control_groups(results):
    """What one run, its snapshots or independent runs reach at the same cost as PAS: for each group
    of runs that differ in what restarts the first of them, and {label: (share of the epochs, models
    at test time, evaluations by seed)}."""
    conditions = ['test images', 'attack seed', 'attack precision', 'test data']
    frame = results.evaluations
    frame = frame[(frame['n_val'] > 0) & frame['two attacks'].notna()]
    for group in alike(frame, [*results.settings, *conditions], ['restart']):
        first, rows = group.iloc[0], {}
        for restart, weights, member, label, share, n_models in CONTROLS:
            names = ['restart', 'weights', 'member']
            ours = group[(group[names] == [restart, weights, member]).all(axis=1)]
            rows[label] = share, n_models, ours.set_index('seed')
        rows['N: independent runs of as many epochs'] = 1, 3, independent(results, first)
        rows = {label: row for label, row in rows.items() if len(row[-1])}
        if len(rows) > 1:
            yield first, rows


def independent(results, first):
    """The errors of ensembles of independent runs that are as long as the periods of the evaluation
    `first` and else trained like it, by the seed of the longest."""
    free = 'restart', 'periods', 'periodic', 'epochs', 'n_val', 'ema'
    alike_in = [name for name in results.settings if name not in free]
    runs = results.runs[results.runs['periodic'] == 'no']
    runs = runs[(runs[alike_in] == first[alike_in]).all(axis=1)]
    run_of = {run['digests']['last'][0]: run for run in runs.to_dict('records') if run['log']}
    rows = []
    for ensemble in results.ensembles.to_dict('records'):
        members = [run_of.get(digest) for digest in ensemble['digests']]
        alike_too = 'test images', 'attack seed', 'attack precision'
        same = all(ensemble[name] == first[name] for name in alike_too)
        same = same and ensemble['eps'] == first['typed eps']
        if same and all(members):
            members.sort(key=lambda run: -run['epochs'])
            if ' '.join(str(run['epochs']) for run in members) == first['periods']:
                rows.append(ensemble | {'seed': members[0]['seed']})
    columns = ['seed', 'clean', 'two attacks', 'AutoAttack']
    return pd.DataFrame(rows, columns=columns).dropna(subset='two attacks').set_index('seed')

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import attack
import data
import models
import record
import schedule
import train
from conftest import printed


def log_of(folder):
    return record.load(folder / 'log.jsonl')


def same(a, b):
    """Whether folders hold the same checkpoints bit for bit, and the same log but for seconds."""
    files = sorted(path.name for path in a.glob('*.pt'))
    assert files == sorted(path.name for path in b.glob('*.pt')) and files
    for name in files:
        one, other = record.load(a / name), record.load(b / name)
        if not (list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)):
            return False
    traces = [folder / 'trace.jsonl' for folder in (a, b)]
    assert traces[0].exists() == traces[1].exists()
    return [row | {'seconds': 0} for row in log_of(a)] \
        == [row | {'seconds': 0} for row in log_of(b)] \
        and (not traces[0].exists() or traces[0].read_bytes() == traces[1].read_bytes())


def test_a_run_leaves_what_the_plan_says(runs):
    folder = runs / 'triple'
    names = sorted(path.name for path in folder.iterdir()
                   if path.suffix in ('.pt', '.jsonl') or path.name == 'config.json')
    assert names == ['config.json', 'log.jsonl', 'period1.pt', 'period2.pt', 'period3.pt']
    config = record.load(folder / 'config.json')
    assert config['periods'] == [2, 1, 1] and config['eps_max'] == .2
    assert config['sessions'][0]['torch'] == torch.__version__
    assert [row['epoch'] for row in log_of(folder)] == [1, 2, 3, 4]
    assert set(log_of(folder)[0]) >= {'t', 'eps', 'lr', 'loss', 'train_robust_error', 'clean_error',
                                      'robust_error', 'seconds'}


def test_the_budget_restarts_with_each_period(runs):
    assert [row['eps'] for row in log_of(runs / 'triple')] == [0, .1, 0, 0]
    assert [row['eps'] for row in log_of(runs / 'single')] == [.1] * 4


def test_training_learns_digits(runs):
    log = log_of(runs / 'single')
    assert log[-1]['loss'] < log[0]['loss'] and log[-1]['clean_error'] < .4


def test_the_logged_errors_are_those_of_the_checkpoint_at_the_target_budget(runs, data_dir):
    model = record.rebuild(runs / 'triple/period3.pt')
    _, _, x, y = data.load('mnist5k', data_dir)
    index = data.subset(1000, 100)
    x, y = x[index], y[index]
    clean = attack.correct(model, x, y)
    robust = clean & attack.correct(model, attack.pgd(model, x, y, .1, .1, 2, index=index), y)
    last = log_of(runs / 'triple')[-1]
    assert last['clean_error'] == pytest.approx(1 - clean.float().mean().item())
    assert last['robust_error'] == pytest.approx(1 - robust.float().mean().item())


def test_one_step_is_sgd_on_the_adversarial_loss_by_hand(data_dir, tmp_path):
    flags = ['--data-dir', str(data_dir), '--width', '1', '--n-train', '64', '--epochs', '1',
             '--batch-size', '64', '--eps', '0.1', '--step-size', '0.05', '--n-iter', '3',
             '--optimizer', 'sgd', '--lr', '0.5', '--weight-decay', '0.01', '--n-eval', '0']
    train.main([*flags, '--out', str(tmp_path / 'run')])
    torch.manual_seed(0)
    model = models.build('lenet', 'mnist5k', 1)
    x, y, _, _ = data.load('mnist5k', data_dir)
    rows = data.subset(4000, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(attack.derive(0, 0)))
    x, y = x[rows][order], y[rows][order]
    x_adv = attack.pgd(model, x, y, .1, .05, 3, seed=attack.derive(0, 0, 0))
    torch.nn.functional.cross_entropy(model(x_adv), y).backward()
    after = record.load(tmp_path / 'run/period1.pt')
    for name, p in model.named_parameters():  # the first step of momentum is a plain one
        assert torch.allclose(after[name], p - .5 * (p.grad + .01 * p), atol=1e-6)


def test_two_steps_with_momentum_and_augmentation_by_hand(data_dir, tmp_path):
    flags = ['--data-dir', str(data_dir), '--width', '1', '--n-train', '64', '--epochs', '1',
             '--batch-size', '32', '--eps', '0.1', '--step-size', '0.05', '--n-iter', '2',
             '--optimizer', 'sgd', '--lr', '0.2', '--augment', '--n-eval', '0', '--seed', '3']
    train.main([*flags, '--out', str(tmp_path / 'run')])
    torch.manual_seed(3)
    model = models.build('lenet', 'mnist5k', 1)
    optimizer = torch.optim.SGD(model.parameters(), .2, momentum=.9)
    x, y, _, _ = data.load('mnist5k', data_dir)
    rows = data.subset(4000, 64)
    generator = torch.Generator().manual_seed(attack.derive(3, 0))
    order = rows[torch.randperm(64, generator=generator)]
    crops = data.crops(64, generator)
    for i in range(2):
        batch = order[32 * i:32 * (i + 1)]
        images = data.crop_and_flip(x[batch], crops[32 * i:32 * (i + 1)])
        assert not torch.equal(images, x[batch])
        x_adv = attack.pgd(model, images, y[batch], .1, .05, 2, seed=attack.derive(3, 0, i))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x_adv), y[batch]).backward()
        optimizer.step()
    after = record.load(tmp_path / 'run/period1.pt')
    for name, p in model.named_parameters():
        assert torch.allclose(after[name], p, atol=1e-6)


def test_the_trace_is_that_of_the_steps_by_hand(data_dir, tmp_path):
    flags = ['--data-dir', str(data_dir), '--width', '1', '--n-train', '60', '--epochs', '2',
             '--batch-size', '20', '--eps', '0.1', '--step-size', '0.05', '--n-iter', '2',
             '--optimizer', 'sgd', '--lr', '0.2', '--weight-decay', '0.1', '--n-eval', '0']
    train.main([*flags, '--out', str(tmp_path / 'run'), '--trace', '2'])
    torch.manual_seed(0)
    model = models.build('lenet', 'mnist5k', 1)
    optimizer = torch.optim.SGD(model.parameters(), .2, momentum=.9, weight_decay=.1)
    theta_0 = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    x, y, _, _ = data.load('mnist5k', data_dir)
    rows, expected = data.subset(4000, 60), []
    for step in range(6):
        epoch, i = divmod(step, 3)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(attack.derive(0, epoch)))
        batch = rows[order[20 * i:20 * (i + 1)]]
        x_adv = attack.pgd(model, x[batch], y[batch], .1, .05, 2, seed=attack.derive(0, epoch, i))
        optimizer.zero_grad()
        logits = model(x_adv)
        torch.nn.functional.cross_entropy(logits, y[batch]).backward()
        theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        expected.append({
            'step': step, 'distance': (theta - theta_0).norm().item(),
            'grad_norm': torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item(),
            'robust_error': (logits.argmax(1) != y[batch]).float().mean().item()})
        optimizer.step()
    found = record.load(tmp_path / 'run/trace.jsonl')
    assert [row['step'] for row in found] == [0, 1, 4, 5] and found[0]['distance'] == 0
    for row in found:
        assert row == pytest.approx(expected[row['step']], rel=1e-4)


def test_a_trace_longer_than_the_run_has_each_update_once(tiny, tmp_path):
    train.main([*tiny, '--trace', '100', '--out', str(tmp_path / 'run')])
    trace = record.load(tmp_path / 'run/trace.jsonl')
    assert [row['step'] for row in trace] == list(range(8))  # 4 epochs of 2 batches


def test_a_trace_changes_nothing_else_and_costs_nothing_when_off(tiny, tmp_path, monkeypatch):
    train.main([*tiny, '--trace', '3', '--out', str(tmp_path / 'on')])
    monkeypatch.setattr(models, 'norm', None)  # would raise if it were called
    train.main([*tiny, '--out', str(tmp_path / 'off')])
    assert not (tmp_path / 'off/trace.jsonl').exists()
    (tmp_path / 'on/trace.jsonl').unlink()
    assert same(tmp_path / 'on', tmp_path / 'off')


def watch_pgd(monkeypatch, name):
    """Replaces PGD by the identity; the list it returns gets the value of `name` in each call."""
    values = []
    for where, attribute in (attack, 'pgd'), (attack.Adversary, '__call__'):
        monkeypatch.setattr(where, attribute, lambda model, x, *args, **rest:
                            values.append(rest[name]) or x)
    return values


def test_each_batch_of_each_epoch_is_attacked_with_randomness_of_its_own(tiny, tmp_path,
                                                                         monkeypatch):
    seeds = watch_pgd(monkeypatch, 'seed')
    train.main([*tiny, '--eps-sched', 'constant', '--n-eval', '0', '--out', str(tmp_path / 'run')])
    assert len(seeds) == len(set(seeds)) == 4 * 2


def test_a_start_anywhere_in_the_ball_is_used_for_training_and_for_the_errors(tiny, tmp_path,
                                                                              monkeypatch):
    starts = watch_pgd(monkeypatch, 'start')
    train.main([*tiny, '--start', 'eps', '--epochs', '2', '--out', str(tmp_path / 'run')])
    assert starts == [.4, .4, .4, .4]  # epoch 1 is clean: its test; epoch 2: two batches, its test


def test_the_attack_step_follows_the_scheduled_budget(tiny, tmp_path, monkeypatch):
    calls = []

    def spy(self, x, y, eps, step_size, **rest):
        calls.append((round(eps, 6), round(step_size, 6), self.n_iter, self.model.training))
        return x

    monkeypatch.setattr(attack.Adversary, '__call__', spy)
    train.main([*tiny, '--out', str(tmp_path / 'run'), '--n-eval', '0'])
    # eps 0 (clean), 0.2, 0.4, 0.4 of the target 0.4, whose step is 0.1
    assert sorted(set(calls)) == [(.2, .05, 2, True), (.4, .1, 2, True)] and len(calls) == 3 * 2


@pytest.mark.parametrize('flags', [['--clock', 'epoch'], ['--clock', 'batch']])
def test_eps_and_lr_follow_their_schedules_on_either_clock(tiny, tmp_path, flags):
    train.main([*tiny, *flags, '--out', str(tmp_path / 'run'), '--lr-sched', 'cosine',
                '--lr-warmup', '.5', '--n-eval', '0'])
    behind = .5 if 'batch' in flags else 0.  # the last of an epoch's two batches
    for epoch, row in enumerate(log_of(tmp_path / 'run')):
        t = (epoch + behind) / 4
        assert row['t'] == t
        assert row['eps'] == pytest.approx(schedule.eps_at(t, 'linear', .4))
        assert row['lr'] == pytest.approx(schedule.lr_at(t, 'cosine', 1e-3, .5))


def test_what_is_measured_does_not_change_what_is_learnt(tiny, tmp_path):
    for n_eval in ('0', '20'):
        train.main([*tiny, '--out', str(tmp_path / n_eval), '--n-eval', n_eval])
    one, other = (record.load(tmp_path / n / 'period1.pt') for n in ('0', '20'))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_seeds_differ(tiny, tmp_path):
    for seed in '12':
        train.main([*tiny, '--out', str(tmp_path / seed), '--seed', seed])
    assert not same(tmp_path / '1', tmp_path / '2')


# Interruption

PERIODIC = ['--periodic', '--device', 'cpu']  # a forked child cannot use cuda


def in_a_child(act):
    """Runs act() in a forked process and returns the signal that ended it, 0 if none."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_at(moment, after, main, argv):
    """Runs main until SIGKILL just before, or `after`, the `moment`-th file is put in its place."""
    def act():
        files, place = iter(range(1000)), os.replace

        def bomb(source, target):
            if after:
                place(source, target)
            if next(files) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            if not after:
                place(source, target)

        os.replace = bomb
        main(argv)
    return in_a_child(act)


@pytest.fixture(scope='module')
def uninterrupted(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    argv = ['--data-dir', str(data_dir), '--width', '1', '--n-train', '256', '--n-eval', '50',
            '--epochs', '4', '--step-size', '0.1', '--n-iter', '2', '--lr', '1e-3',
            '--eps-sched', 'linear', '--trace', '3', *PERIODIC]
    train.main([*argv, '--out', str(folder)])
    return argv, folder


@pytest.mark.parametrize('moment, after', [(i, False) for i in range(15)] + [(14, True)])
def test_a_run_killed_at_any_file_it_writes_ends_as_an_uninterrupted_one(
        uninterrupted, tmp_path, moment, after):
    argv, whole = uninterrupted
    argv = [*argv, '--out', str(tmp_path / 'run')]
    assert killed_at(moment, after, train.main, argv) == signal.SIGKILL
    assert in_a_child(lambda: train.main(argv)) == 0
    assert same(tmp_path / 'run', whole)
    assert not list((tmp_path / 'run').glob('.*'))  # nothing half-written is left


def test_a_run_killed_again_and_again_ends_as_an_uninterrupted_one(uninterrupted, tmp_path):
    argv, whole = uninterrupted
    argv, kills = [*argv, '--out', str(tmp_path / 'run')], 0
    while killed_at(4 + kills % 2, kills % 2 == 0, train.main, argv) == signal.SIGKILL:
        kills += 1
    assert kills >= 3 and same(tmp_path / 'run', whole)


def test_a_process_killed_from_outside_ends_as_an_uninterrupted_one(uninterrupted, tmp_path):
    argv, whole = uninterrupted
    folder = tmp_path / 'run'
    threads = 'import torch; torch.set_num_threads(1); import train; train.main()'
    command = [sys.executable, '-c', threads, *argv, '--out', str(folder)]
    here = pathlib.Path(train.__file__).parent
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / 'period1.pt').exists():  # the second of four epochs
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not record.finished(folder)
    train.main([*argv, '--out', str(folder)])
    assert same(folder, whole)


@pytest.mark.parametrize('flags', [
    ['--optimizer', 'sgd', '--lr', '0.01'], ['--clock', 'batch', '--lr-sched', 'cosine'],
    ['--model', 'resnet18', '--n-train', '40', '--batch-size', '20', '--augment', '--n-eval', '4']])
def test_minutes_stops_cleanly_and_the_same_command_goes_on_to_the_same_end(
        tiny, tmp_path, flags, capsys):
    argv = [*tiny, *flags]
    train.main([*argv, '--out', str(tmp_path / 'whole')])
    for epochs in (1, 2, 3):
        train.main([*argv, '--out', str(tmp_path / 'parts'), '--minutes', '0'])
        assert len(log_of(tmp_path / 'parts')) == epochs
        assert f'stopped after epoch {epochs} of 4' in capsys.readouterr().out
    train.main([*argv, '--out', str(tmp_path / 'parts'), '--minutes', '0'])
    assert same(tmp_path / 'parts', tmp_path / 'whole')


def test_a_finished_run_does_nothing_and_says_so(tiny, tmp_path, capsys):
    argv = [*tiny, '--out', str(tmp_path / 'run')]
    train.main(argv)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').iterdir()}
    capsys.readouterr()
    train.main(argv)
    assert 'is finished' in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').iterdir()}


def test_a_changed_flag_on_an_existing_run_is_named_and_loses_nothing(tiny, tmp_path):
    argv = [*tiny, '--out', str(tmp_path / 'run')]
    train.main([*argv, '--minutes', '0'])
    before = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    with pytest.raises(ValueError, match=r'--lr 0.001 \(now 0.002\), --batch-size 128 \(now 64\)'
                                         r'|--batch-size.*--lr'):
        train.main([*argv, '--lr', '2e-3', '--batch-size', '64'])
    assert before == {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}


def test_a_run_in_use_is_refused(tiny, tmp_path):
    def act():
        try:
            train.main([*tiny, '--device', 'cpu', '--out', str(tmp_path / 'run')])
        except ValueError as error:
            os._exit(0 if 'in use' in str(error) else 1)
        os._exit(1)

    with record.lock(tmp_path / 'run'):
        assert in_a_child(act) == 0
    train.main([*tiny, '--out', str(tmp_path / 'run')])  # and free again


def test_with_wait_a_run_in_use_is_waited_for(tiny, tmp_path, capfd):
    argv = [*tiny, '--device', 'cpu', '--out', str(tmp_path / 'run'), '--wait']
    with record.lock(tmp_path / 'run'):
        child = os.fork()
        if not child:
            code = 1
            try:
                train.main(argv)
                code = 0
            finally:
                os._exit(code)
        while 'waiting' not in capfd.readouterr().out:
            time.sleep(.05)
        assert not (tmp_path / 'run/config.json').exists()
    assert os.waitpid(child, 0)[1] == 0
    assert record.finished(tmp_path / 'run')
    assert not (tmp_path / 'run/.lock').exists()


def test_a_lock_is_had_by_one_of_many_at_a_time(tmp_path):
    def act():
        for _ in range(50):
            with record.lock(tmp_path, wait=True):
                (tmp_path / 'inside').mkdir()  # fails where another one is inside
                (tmp_path / 'inside').rmdir()
        os._exit(0)

    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            try:
                act()
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_loss_is_not_finite_leaves_word(tiny, tmp_path):
    with pytest.raises(ValueError, match='smaller --lr'):
        train.main([*tiny, '--optimizer', 'sgd', '--lr', '1e9', '--out', str(tmp_path / 'run')])
    assert record.load(tmp_path / 'run/diverged.json')['epoch'] >= 1


def test_a_folder_of_other_things_is_not_taken_for_a_run(tiny, tmp_path):
    (tmp_path / 'thesis.tex').write_text('chapter 1')
    with pytest.raises(ValueError, match='no run'):
        train.main([*tiny, '--out', str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize('part', [
    {'periods': []}, {'periods': [1, '2']}, {'n_train': '64'}, {'n_iter': 0}, {'step_size': -1},
    {'eps': 2}, {'width': None}], ids=str)
def test_a_damaged_config_is_named_with_the_way_out(tmp_path, part):
    config = vars(train.settings(train.parse([]))) | {'sessions': []}
    record.save(tmp_path / 'config.json', config)
    assert record.config_of(tmp_path) == config
    record.save(tmp_path / 'config.json', config | part)
    with pytest.raises(ValueError, match='config.json is damaged; .* must begin again'):
        record.config_of(tmp_path)


def test_files_of_others_are_left_alone(tiny, tmp_path):
    (tmp_path / '.important.tmp').write_text('mine')
    (tmp_path / '.log.jsonl.77.tmp').write_text('of a killed run')
    with pytest.raises(ValueError, match='no run'):
        train.main([*tiny, '--out', str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ['.important.tmp']


@pytest.mark.parametrize('content', [
    {}, [1], {'model': {}}, {'log': [1]}, {'log': 'x'}, {'optimizer': {}}, {'model': {'a': 0}},
    'another seed', 'cut'], ids=str)
def test_a_last_pt_that_is_not_of_this_run_is_refused_with_the_way_out(tiny, tmp_path, content):
    argv = [*tiny, '--out', str(tmp_path / 'run')]
    train.main([*argv, '--minutes', '0'])
    last = tmp_path / 'run/last.pt'
    if content == 'another seed':
        train.main([*tiny, '--seed', '5', '--out', str(tmp_path / 'other'), '--minutes', '0'])
        last.write_bytes((tmp_path / 'other/last.pt').read_bytes())
    elif content == 'cut':
        last.write_bytes(last.read_bytes()[:5000])
    else:
        whole = record.load(last) if content and isinstance(content, dict) else {}
        torch.save(whole | content if whole else content, last)
    with pytest.raises(ValueError, match='last.pt (is not of this run|does not fit this run|'
                       'is truncated .*); delete it, and the run begins again'):
        train.main(argv)
    assert len(log_of(tmp_path / 'run')) == 1
    last.unlink()
    train.main(argv)
    train.main([*tiny, '--out', str(tmp_path / 'whole')])
    assert same(tmp_path / 'run', tmp_path / 'whole')


def test_a_lost_period_is_made_again(tiny, tmp_path, capsys):
    argv = [*tiny, '--periodic', '--out', str(tmp_path / 'run')]
    for _ in range(3):
        train.main([*argv, '--minutes', '0'])
    whole = record.load(tmp_path / 'run/period1.pt')
    (tmp_path / 'run/period1.pt').unlink()
    capsys.readouterr()
    train.main(argv)
    assert 'period1.pt is missing; it begins again' in capsys.readouterr().out
    again = record.load(tmp_path / 'run/period1.pt')
    assert record.finished(tmp_path / 'run')
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize('content', ['[]', '{}', '{"dataset"', ''])
def test_a_damaged_config_is_refused_by_name(tiny, tmp_path, content):
    argv = [*tiny, '--out', str(tmp_path / 'run')]
    train.main([*argv, '--minutes', '0'])
    (tmp_path / 'run/config.json').write_text(content)
    with pytest.raises(ValueError, match='run/config.json is .*damaged'):
        train.main(argv)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing_half(tmp_path):
    (tmp_path / 'log.jsonl').write_text('old')

    def fail(file):
        file.write(b'half')
        raise OSError('disk full')

    with pytest.raises(OSError, match='log.jsonl could not be written .*disk full'):
        record.replace(tmp_path / 'log.jsonl', fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('log.jsonl', 'old')]


# What goes wrong

def test_a_loss_that_turns_nan_stops_with_a_message_and_keeps_the_epochs_before(tiny, tmp_path):
    argv = [*tiny, '--out', str(tmp_path / 'run'), '--optimizer', 'sgd', '--lr', '1e9',
            '--lr-warmup', '.1', '--eps-sched', 'constant']
    with pytest.raises(ValueError, match='epoch 2.*nan.*--lr than 1e[+]09'):
        train.main(argv)
    assert len(log_of(tmp_path / 'run')) == 1 and (tmp_path / 'run/last.pt').exists()


def test_a_collapse_to_a_constant_classifier_is_called_by_its_name(tiny, tmp_path, capsys):
    train.main([*tiny, '--out', str(tmp_path / 'run'), '--eps-sched', 'constant', '--lr', '0.03'])
    assert log_of(tmp_path / 'run')[-1]['predicted_classes'] == 1
    assert 'constant classifier' in capsys.readouterr().out


def test_the_test_budget_0_is_clean_training(tiny, tmp_path):
    train.main([*tiny, '--out', str(tmp_path / 'run'), '--eps', '0'])
    assert all(row['eps'] == 0 and row['clean_error'] == row['robust_error']
               for row in log_of(tmp_path / 'run'))


@pytest.mark.parametrize('flags, message', [
    (['--eps', '8'], 'did you mean 8/255'), (['--eps', '-0.1'], '-0.1'), (['--eps', 'x'], "'x'"),
    (['--epochs', '0'], '0 is not at least 1'), (['--lr', '-1'], '-1 is not at least 0'),
    (['--width', '0'], '0'), (['--eps-sched', 'cosin'], 'cosin'), (['--lr', 'nan'], 'nan'),
    (['--model', 'resnet'], 'resnet'), (['--n-iter', '0'], '0'),
    (['--lr-warmup', '2'], '2 is not at most 1'), (['--epsilon', '1'], '--epsilon'),
    (['--eps-max', '16'], 'did you mean 16/255'), (['--eps-min', 'nan'], 'nan'),
    (['--eps', '1e400'], '1e400'), (['--eps', '8/0'], '8/0'), (['--lr', '1e300'], '1e300'),
    (['--batch-size', '1' + 30 * '0'], 'at most'), (['--device', 'meta'], 'meta'),
    (['--seed', '4294967296'], 'at most')])
def test_a_bad_flag_is_refused_with_its_value(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('flags, message', [
    (['--periodic', '--epochs', '3'], 'got 3'),
    (['--periods', '3', '2', '--epochs', '4'], '--periods 3 2'),
    (['--n-train', '5000'], '5000 of 4000'), (['--n-eval', '1001'], '1001 of 1000'),
    (['--step-size', '0'], 'step'),
    (['--eps-sched', 'linear', '--eps-min', '0.3', '--eps-max', '0.2'], '0.3 .* 0.2')])
def test_flags_that_do_not_go_together_are_refused_before_anything_is_written(
        flags, message, data_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(['--data-dir', str(data_dir), '--out', str(tmp_path / 'run'), *flags])
    assert not (tmp_path / 'run').exists()


def test_bad_input_ends_a_script_with_one_line():
    here = pathlib.Path(train.__file__).parent
    done = subprocess.run([sys.executable, 'train.py', '--periodic', '--epochs', '3'], cwd=here,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


# Defaults

def settings(*argv):
    return train.settings(train.parse(list(argv)))


def test_the_command_of_the_readme_is_the_papers_row():
    c = settings('--dataset', 'cifar10', '--eps-sched', 'linear', '--periodic')
    assert (c.model, c.width, c.periods, c.batch_size) == ('resnet18', 8, [100, 50, 50], 128)
    assert (c.optimizer, c.lr, c.lr_sched, c.momentum, c.weight_decay, c.augment) \
        == ('sgd', .1, 'step', .9, 1e-3, True)
    assert [255 * v for v in (c.eps, c.eps_min, c.eps_max, c.step_size)] \
        == pytest.approx([8, 0, 16, 2])
    assert c.n_iter == 10 and c.clock == 'epoch' and c.start == 'step'


def test_mnist_defaults_are_the_papers():
    c = settings('--dataset', 'mnist', '--eps-sched', 'cosine')
    assert (c.model, c.width, c.periods, c.batch_size, c.eps, c.eps_max) \
        == ('lenet', 16, [100], 128, .4, pytest.approx(.6))
    assert (c.optimizer, c.lr, c.lr_sched, c.weight_decay, c.augment, c.step_size, c.n_iter) \
        == ('adam', 1e-4, 'constant', 0, False, .01, 50)
    assert settings('--dataset', 'mnist', '--eps-sched', 'linear').eps_max == pytest.approx(.8)


def test_flags_override_the_papers_settings():
    c = settings('--dataset', 'cifar10', '--model', 'vgg', '--eps', '4/255', '--no-augment',
                 '--periods', '3', '2', '--lr', '0')
    assert (c.model, c.width, c.augment, c.periods, c.epochs, c.lr) \
        == ('vgg', 8, False, [3, 2], 5, 0)
    assert [255 * c.eps, 255 * c.step_size] == pytest.approx([4, 1])
    assert settings('--model', 'lenet', '--dataset', 'cifar10').width == 16


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit, match='0'):
        train.parse(['--help'])
    entries = re.split(r'\n  (?=-)', capsys.readouterr().out.partition('options:')[2])[1:]
    assert len(entries) > 25
    assert all(re.search(r'(  |\n) +\S+ \S+', entry) for entry in entries)


# Precision and compilation: the logic of the cuda paths, on the CPU

@pytest.mark.parametrize('model', models.MODELS)
@pytest.mark.parametrize('precision', ['bf16', 'tf32'])
def test_every_model_trains_in_every_precision_and_is_measured_in_float32(
        tiny, tmp_path, monkeypatch, model, precision):
    seen = []

    def spy(net, x, *args, **rest):
        net = getattr(net, 'network', net)  # of an Adversary
        with models.frozen(net), torch.no_grad():
            seen.append((net(x[:2]).dtype, torch.backends.cudnn.allow_tf32, x.dtype))
        return x

    monkeypatch.setattr(attack, 'pgd', spy)
    monkeypatch.setattr(attack.Adversary, '__call__', spy)
    train.main([*tiny, '--model', model, '--n-train', '16', '--batch-size', '16', '--n-eval', '4',
                '--epochs', '1', '--eps-sched', 'constant', '--precision', precision,
                '--out', str(tmp_path / 'run')])
    inside = torch.bfloat16 if precision == 'bf16' else torch.float32
    assert seen == [(inside, True, torch.float32), (torch.float32, False, torch.float32)]
    assert all(value.dtype in (torch.float32, torch.int64)
               for value in record.load(tmp_path / 'run/period1.pt').values())


@pytest.mark.parametrize('precision, allowed', [('fp32', False), ('tf32', True), ('bf16', True)])
def test_precision_holds_in_the_backward_pass_too(tiny, tmp_path, monkeypatch, precision, allowed):
    build, seen = models.build, []

    def watched(*args):
        model = build(*args)
        model.fc1.weight.register_hook(lambda grad: seen.append(
            (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())))
        return model

    monkeypatch.setattr(models, 'build', watched)
    train.main([*tiny, '--epochs', '1', '--precision', precision, '--out', str(tmp_path / 'run')])
    assert seen == [(allowed, 'high' if allowed else 'highest')] * 2


def replayed(run):
    """In place of a CUDA graph: the loop once for the capture, and again for each replay."""
    run()
    return run


@pytest.fixture
def in_double(monkeypatch):
    """All numbers are doubles, so that two ways to compute one thing differ by next to nothing."""
    load = data.load
    monkeypatch.setattr(data, 'load', lambda *args: [
        tensor.double() if tensor.is_floating_point() else tensor for tensor in load(*args)])
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('model', ['lenet', 'resnet18'])
def test_no_speed_up_changes_what_is_learnt(tiny, tmp_path, monkeypatch, in_double, model):
    argv = [*tiny, '--model', model, '--n-train', '20', '--batch-size', '12', '--n-eval', '4',
            '--epochs', '4', '--periodic', '--optimizer', 'sgd', '--lr', '.02', '--out']
    compile_, adversary = torch.compile, attack.Adversary
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'channels_last', torch.contiguous_format)
        train.main([*argv, str(tmp_path / 'folded')])
        patch.setattr(models, 'folded', lambda model, x=None: models.unfolded(model))
        train.main([*argv, str(tmp_path / 'plain')])
    train.main([*argv, str(tmp_path / 'channels_last')])
    with monkeypatch.context() as patch:  # the tracing, without a C++ compiler
        patch.setattr(torch, 'compile', lambda net: compile_(net, backend='eager'))
        train.main([*argv, str(tmp_path / 'compiled'), '--compile'])
    with monkeypatch.context() as patch:
        patch.setattr(attack, 'Adversary', functools.partial(adversary, captured=replayed))
        train.main([*argv, str(tmp_path / 'captured')])
    plain = record.load(tmp_path / 'plain/period3.pt')
    assert next(iter(plain.values())).dtype == torch.float64
    for mode in 'folded', 'channels_last', 'compiled', 'captured':
        for row, expected in zip(log_of(tmp_path / mode), log_of(tmp_path / 'plain')):
            assert row['loss'] == pytest.approx(expected['loss'], rel=1e-9), mode
        found = record.load(tmp_path / mode / 'period3.pt')
        assert list(found) == list(plain), mode
        assert all(torch.allclose(found[key], plain[key], atol=1e-7) for key in plain), mode


def test_a_step_of_resnet18_on_128_images_stays_below_2_gib():
    assert 2 ** 27 < printed("""
import torch, tqdm
import attack, models, train
c = train.settings(train.parse(['--dataset', 'cifar10', '--n-iter', '1', '--no-augment']))
model = models.build('resnet18', 'cifar10', c.width).to(memory_format=torch.channels_last)
x = torch.rand(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
train.train_epoch(model, attack.Adversary(model, 1), train.optimizer_of(model, c), x,
                  torch.arange(128) % 10, c, 0, [], tqdm.tqdm(disable=True))
print(peak())
""") < 2 ** 31


def test_a_compiler_that_fails_is_named_with_the_way_out(tiny, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError('no compiler at hand')

    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net: compile_(net, backend=broken))
    with pytest.raises(ValueError, match='--compile failed: .*no compiler at hand.* without it'):
        train.main([*tiny, '--out', str(tmp_path / 'run'), '--compile'])
    monkeypatch.undo()
    train.main([*tiny, '--out', str(tmp_path / 'run')])
    assert record.finished(tmp_path / 'run')

import functools
import math
import os
import re
import signal
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import attack
import data
import models
import train
from lib import classifier, fast, record, rng


def log_of(folder):
    return record.load(folder / 'log.jsonl')


def same(a, b):
    """Whether folders hold the same models, trace and log, bit for bit but for what it cost."""
    found = []
    for folder in a, b:
        files = [*sorted(folder.glob('*.pt')), *folder.glob('trace.jsonl')]
        log = [row | {'seconds': 0, 'gib': 0} for row in log_of(folder)]
        found.append(({file.name: file.read_bytes() for file in files}, log))
    return found[0] == found[1]


def test_a_run_leaves_settings_a_log_and_a_model_for_each_period(runs):
    folder = runs / 'triple'
    names = {path.name for path in folder.iterdir() if path.suffix in ('.json', '.jsonl', '.pt')}
    assert names == {'config.json', 'log.jsonl', 'period1.pt', 'period2.pt', 'period3.pt'}
    config, log = record.load_config(folder), log_of(folder)
    assert all(0.1 < row['gib'] < 16 for row in log)
    digests = [record.digest(file) for file in record.period_files(folder, config)]
    assert [row['digest'] for row in log if 'digest' in row] == digests
    assert config['provenance'][0]['torch'] == torch.__version__
    assert [(row['epoch'], row['eps']) for row in log] == [(1, 0), (2, 0.1), (3, 0), (4, 0)]


def test_the_logged_errors_are_those_of_the_checkpoint_at_the_target_budget(runs):
    model, _ = record.load_model(runs / 'triple/period3.pt')
    index, last = data.subset(1000, 100), log_of(runs / 'triple')[-1]
    x, y = (tensor[index] for tensor in data.load('mnist5k')[2:])
    clean = classifier.correct(model, x, y)
    x_adv = attack.pgd(model, x, y, 0.1, 0.1, 2, index=index)
    robust = clean & classifier.correct(model, x_adv, y)
    assert last['eps'] == 0 and last['clean_error'] < last['robust_error']
    assert last['clean_error'] == pytest.approx(1 - clean.float().mean().item())
    assert last['robust_error'] == pytest.approx(1 - robust.float().mean().item())


def test_an_image_that_is_wrong_when_clean_counts_as_fooled(monkeypatch):
    monkeypatch.setattr(train, 'pgd', lambda model, x, *args, **options: 1 - x)
    model, x = fast.Folded(torch.nn.Flatten(), []), torch.eye(2)[:, None, None]  # logits: pixels
    config = train.settings(train.parser().parse_args(['--eps', '1']))
    found = train.validate(model, x, torch.tensor([1, 0]), None, config)
    assert found['clean_error'] == found['robust_error'] == 1


@pytest.fixture
def in_double(monkeypatch):
    """All numbers are doubles, so that two ways to compute one thing differ by next to nothing."""
    tensors = data.load('mnist5k')
    doubles = [t.double() if t.is_floating_point() else t for t in tensors]
    monkeypatch.setattr(data, 'load', lambda *args: doubles)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain_pgd(model, x, y, eps, step_size, start, seed):
    """Two steps in eval mode, as in the paper."""
    noise = rng.uniform('pgd', seed, torch.arange(len(x)), x.shape[1:], x)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv = (x + start * (2 * noise - 1)).clamp(low, high)
    for _ in range(2):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model.eval()(x_adv), y), x_adv)
        x_adv = (x_adv.detach() + step_size * grad.sign()).clamp(low, high)
    return x_adv


@pytest.mark.parametrize(
    'flags',
    [
        '--model lenet --lr 0.2 --optimizer sgd --weight-decay 0.1',
        '--model resnet18 --lr 0.2 --optimizer sgd --augment',
        '--model lenet --lr 1e-3 --optimizer adam --start eps',
    ],
)
def test_four_updates_are_those_of_plain_torch_code(flags, tmp_path, in_double):
    always = '--width 1 --n-train 20 --batch-size 12 --n-eval 4 --epochs 2 --clock batch --seed 3'
    always += ' --eps 0.1 --eps-sched linear --step-size 0.05 --n-iter 2 --lr-sched cosine'
    train.main([*flags.split(), *always.split(), '--trace', '1', '--out', 'run'])
    torch.manual_seed(3)
    words = flags.split()
    model, lr = models.build(words[1], data.DATASETS['mnist5k'], 1), float(words[3])
    parameters = list(model.parameters())
    decay = 0.1 if 'weight-decay' in flags else 0
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=decay)
    if 'adam' in flags:
        optimizer = torch.optim.Adam(parameters, lr)
    theta_0 = parameters_to_vector(parameters).detach().clone()
    (x, y, _, _), rows, trace = data.load('mnist5k'), data.subset(4000, 20), []
    for epoch in range(2):
        generator = rng.generator(3, epoch)
        order = rows[torch.randperm(20, generator=generator)].split(12)
        crops = data.crops(20, generator).split(12)
        for i in range(2):
            t = epoch / 2 + i / 4
            images, labels, eps = x[order[i]], y[order[i]], min(0.2 * t, 0.1)
            images = data.crop_and_flip(images, crops[i]) if 'augment' in flags else images
            start = eps if 'start' in flags else eps / 2
            seed = rng.fold_in(3, epoch, i)
            x_adv = plain_pgd(model, images, labels, eps, eps / 2, start, seed)
            logits = model.train()(x_adv.detach())
            optimizer.param_groups[0]['lr'] = lr * (1 + math.cos(math.pi * t)) / 2
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            moved = parameters_to_vector(parameters).detach() - theta_0
            grad_norm = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
            error = (logits.argmax(1) != labels).double().mean().item()
            numbers = (2 * epoch + i, grad_norm, error, moved.norm().item())
            trace.append(dict(zip(('step', 'grad_norm', 'robust_error', 'distance'), numbers)))
            optimizer.step()
    found = record.load(tmp_path / 'run/period1.pt')
    for name, value in model.state_dict().items():
        assert torch.allclose(found[name], value, atol=1e-7), name
    first, last = record.load(tmp_path / 'run/trace.jsonl')
    assert first == pytest.approx(trace[0]) and last == pytest.approx(trace[3])


def test_parameters_that_the_loss_does_not_use_change_nothing(tiny, tmp_path, monkeypatch):
    class Spare(models.LeNet):
        def __init__(self, *args):
            super().__init__(*args)
            self.unused = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setitem(models.MODELS, 'spare', Spare)
    for name in 'lenet', 'spare':
        train.main([*tiny, '--model', name, '--trace', '1', '--out', name])
    ours, theirs = (record.load(tmp_path / name / 'trace.jsonl') for name in ('spare', 'lenet'))
    assert ours == theirs


def test_held_out_images_are_of_the_training_set_and_not_trained_on(tiny):
    args = train.parser().parse_args([*tiny, '--n-val', '30'])
    x, _, _, (held_out, _, index) = train.images(train.settings(args), args)
    x_train = data.load('mnist5k')[0]
    assert torch.equal(x, x_train[data.subset(4000, 256)])  # as without --n-val
    assert torch.equal(held_out, x_train[index]) and len(index) == 30
    assert not set(index.tolist()) & set(data.subset(4000, 256).tolist())
    rest, others = data.split(50, None, 20)
    assert sorted([*rest.tolist(), *others.tolist()]) == [*range(50)]
    with pytest.raises(ValueError, match='--n-train 40 and --n-val 20: there are 50'):
        data.split(50, 40, 20)


def test_the_best_model_of_each_period_is_the_first_with_the_least_error_on_held_out_images(
    tiny, tmp_path
):
    flags = '--epochs 8 --periodic --n-val 40 --lr 0.01 --eps 0.2 --restart eps'
    train.main([*tiny, *flags.split(), '--out', 'run'])
    log, index = log_of(tmp_path / 'run'), data.split(4000, 256, 40)[1]
    x, y = (tensor[index] for tensor in data.load('mnist5k')[:2])
    for i, rows in enumerate((log[:4], log[4:6], log[6:])):
        model, _ = record.load_model(tmp_path / f'run/best{i + 1}.pt')
        x_adv = attack.pgd(model, x, y, 0.2, 0.1, 2, index=index)
        robust = classifier.correct(model, x, y) & classifier.correct(model, x_adv, y)
        errors = [row['val_robust_error'] for row in rows]
        assert min(errors) == pytest.approx(1 - robust.float().mean().item())
        assert rows[-1]['best_digest'] == record.digest(tmp_path / f'run/best{i + 1}.pt')
    chosen = [record.load(tmp_path / f'run/{name}1.pt')['fc2.bias'] for name in ('best', 'period')]
    assert torch.equal(*chosen) == (log[3]['val_robust_error'] < min(errors_of(log[:3])))


def errors_of(rows):
    return [row['val_robust_error'] for row in rows]


def test_the_average_of_a_period_is_its_closed_form_and_begins_anew(tiny, tmp_path, monkeypatch):
    states, build = [], train.build_optimizer

    def watched(model, config):
        optimizer = build(model, config)
        optimizer.register_step_post_hook(
            lambda *_: states.append({k: v.clone() for k, v in model.state_dict().items()})
        )
        return optimizer

    monkeypatch.setattr(train, 'build_optimizer', watched)
    flags = '--model resnet18 --n-train 24 --batch-size 8 --n-eval 0 --ema 0.7 --periods 2 1'
    train.main(
        [*[word for word in tiny if word not in ('--epochs', '4')], *flags.split(), '--out', 'run']
    )
    for i, period in enumerate((states[:6], states[6:])):
        found = record.load(tmp_path / f'run/ema{i + 1}.pt')
        n = len(period)
        weights = [0.7 ** (n - 1), *(0.3 * 0.7 ** (n - 1 - k) for k in range(1, n))]
        for name in 'conv1.weight', 'bn1.running_mean', 'classifier.bias':
            expected = sum(w * state[name] for w, state in zip(weights, period))
            assert torch.allclose(found[name], expected, atol=1e-6), name


# eps and lr at six epochs of the periods 4 and 2, worked out by hand: t is 0, 1/4 ... or 0, 1/6 ...
ANEW, WHOLE = [0, 0.2, 0.4, 0.4, 0, 0.4], [0, 0.8 / 6, 1.6 / 6, 0.4, 0.4, 0.4]
LR_ANEW, LR_WHOLE = [1, 1, 0.1, 0.01, 1, 0.1], [1, 1, 1, 0.1, 0.1, 0.01]


@pytest.mark.parametrize(
    'restart, eps, lr',
    [
        ('lr eps', ANEW, LR_ANEW),
        ('lr', WHOLE, LR_ANEW),
        ('eps', ANEW, LR_WHOLE),
        ('none', WHOLE, LR_WHOLE),
    ],
)
def test_what_does_not_restart_follows_the_whole_run(restart, eps, lr):
    flags = f'--eps-sched linear --lr-sched step --lr 1 --periods 4 2 --restart {restart}'
    config = train.settings(train.parser().parse_args(flags.split()))
    found = [train.clock(config, epoch, 0, 1) for epoch in range(6)]
    assert [row[1] for row in found] == pytest.approx(eps)
    assert [row[2] for row in found] == pytest.approx(lr)


def test_without_restarts_periods_are_snapshots_of_the_plain_run(tiny, tmp_path):
    train.main([*tiny, '--out', 'plain'])
    argv = [word for word in tiny if word not in ('--epochs', '4')]
    train.main([*argv, *'--periods 2 1 1 --restart none --n-val 20 --ema 0.9 --out snap'.split()])
    plain, last = (tmp_path / name for name in ('plain/period1.pt', 'snap/period3.pt'))
    assert plain.read_bytes() == last.read_bytes()


def test_without_restarts_the_best_model_is_that_of_the_run_so_far(tiny, tmp_path, monkeypatch):
    errors = iter(error for error in (0.5, 0.2, 0.3, 0.2, 0.1) for _ in range(2))
    found = {'clean_error': 0.1, 'predicted_classes': 10}
    monkeypatch.setattr(train, 'validate', lambda *_: found | {'robust_error': next(errors)})
    argv = [word for word in tiny if word not in ('--epochs', '4')]
    train.main([*argv, *'--periods 2 2 1 --restart none --n-val 20 --out run'.split()])
    best = [(tmp_path / f'run/best{i}.pt').read_bytes() for i in (1, 2, 3)]
    periods = [(tmp_path / f'run/period{i}.pt').read_bytes() for i in (1, 3)]
    assert best == [periods[0], periods[0], periods[1]]


@pytest.mark.parametrize('clock, last', [('epoch', 0), ('batch', 0.5)])
def test_lr_warm_up_trains_no_epoch_at_0_on_either_clock(tiny, tmp_path, clock, last):
    flags = f'--lr-sched cosine --lr-warmup 0.5 --n-eval 0 --clock {clock} --out run'
    train.main([*tiny, *flags.split()])
    for epoch, row in enumerate(log_of(tmp_path / 'run')):
        t = (epoch + last) / 4  # of the last of an epoch's two batches
        lr = 1e-3 * (1 + math.cos(math.pi * t)) / 2 * min((epoch + 1) / 2, 1)
        assert (row['t'], row['eps'], row['lr']) == pytest.approx((t, min(0.8 * t, 0.4), lr))


# Interruption

KILLED = '--width 1 --n-train 40 --batch-size 20 --n-eval 10 --epochs 4 --step-size 0.1 --n-iter 2'
KILLED += ' --lr 1e-3 --eps-sched linear --trace 3 --periodic --device cpu'
KILLED += ' --n-val 20 --ema 0.9 --restart eps'
N_FILES = 22  # that such a run writes


def killed_at(moment, after, main, argv):
    """Runs main in a child until SIGKILL just before, or `after`, it places the moment-th file."""
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    files, place = iter(range(1000)), os.replace

    def bomb(source, target):
        if after:
            place(source, target)
        if next(files) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            place(source, target)

    try:
        os.replace = bomb
        main(argv)
    finally:
        os._exit(0)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train.main([*KILLED.split(), '--out', str(folder)])
    return folder


@pytest.mark.parametrize(
    'moment, after', [*((i, False) for i in range(N_FILES)), (N_FILES - 1, True)]
)
def test_a_run_killed_at_any_file_it_writes_ends_as_one_in_one_go(whole, tmp_path, moment, after):
    argv = [*KILLED.split(), '--out', 'run']
    assert killed_at(moment, after, train.main, argv) == signal.SIGKILL
    train.main(argv)
    assert same(tmp_path / 'run', whole)
    hidden = [path.name for path in (tmp_path / 'run').glob('.*')]
    assert set(hidden) <= {'.lock'}  # nothing half-written is left


def test_a_run_in_parts_of_some_minutes_ends_as_one_in_one_go(tiny, tmp_path, capsys):
    flags = '--model resnet18 --augment --n-train 12 --batch-size 6 --n-eval 4 --clock batch'
    argv = [*tiny, *flags.split(), '--optimizer', 'sgd']
    train.main([*argv, '--out', 'whole'])
    for epochs in 1, 2, 3, 4:
        train.main([*argv, '--out', 'parts', '--minutes', '0'])
        assert len(log_of(tmp_path / 'parts')) == epochs
    assert capsys.readouterr().out.count('the same command resumes it') == 3
    assert same(tmp_path / 'parts', tmp_path / 'whole')


def test_a_run_begun_on_a_gpu_goes_on_with_the_cpus_optimizer(tiny, tmp_path):
    argv = [*tiny, '--n-train', '12', '--n-eval', '0']
    train.main([*argv, '--out', 'whole'])
    train.main([*argv, '--out', 'moved', '--minutes', '0'])
    state = record.load(tmp_path / 'moved/last.pt')
    state['optimizer']['param_groups'][0]['fused'] = True
    record.save(tmp_path / 'moved/last.pt', state)
    train.main([*argv, '--out', 'moved'])
    assert same(tmp_path / 'moved', tmp_path / 'whole')


def test_a_period_too_short_for_its_ramp_is_said_before_training(tiny, tmp_path, capsys):
    train.main([*tiny, '--periodic', '--n-eval', '0', '--out', 'run'])
    warning, *epochs = capsys.readouterr().out.splitlines()[1:]
    assert 'eps stays 0 in a period of 1 epoch' in warning
    train.main([*tiny, '--n-eval', '0', '--out', 'plain'])
    assert 'warning' not in capsys.readouterr().out


def test_a_collapse_to_a_constant_classifier_is_called_by_its_name(tiny, tmp_path, capsys):
    train.main([*tiny, '--eps-sched', 'constant', '--lr', '0.03', '--out', 'run'])
    assert log_of(tmp_path / 'run')[-1]['predicted_classes'] == 1
    assert 'constant classifier' in capsys.readouterr().out


def test_the_budget_0_is_clean_training(tiny, tmp_path):
    train.main([*tiny, '--eps', '0', '--out', 'run'])
    log = log_of(tmp_path / 'run')
    assert all(row['eps'] == 0 and row['clean_error'] == row['robust_error'] for row in log)


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--eps 8', '--eps: 8 is not in .* did you mean 8/255'),
        ('--eps nan', '--eps: nan is not in'),
        ('--periods 4 -1', "--periods: '-1'"),
        ('--width 1.5', "--width: '1.5'"),
        ('--batch-size 0', "--batch-size: '0'"),
        ('--device tpu', '--device: tpu'),
        ('--periodic --epochs 3', 'at least 4 epochs, got 3'),
        ('--periods 3 2 --epochs 4', '--periods .*--epochs'),
        ('--eps -0.1', '--eps: -0.1 is not in'),
        ('--step-size 0', '--step-size 0 attacks nothing'),
        ('--step-size eps/0', "--step-size: 'eps/0'"),
        ('--lr-warmup 2', "--lr-warmup: '2' is not a number from 0 to 1"),
        ('--n-eval -1', "--n-eval: '-1' is not"),
        ('--lr nan', "--lr: 'nan' is not a number from 0"),
        ('--n-val x', "--n-val: 'x' is not"),
        ('--ema 1.5', "--ema: '1.5' is not a number from 0 to 1"),
        ('--restart none lr', '--restart none stands alone'),
        ('--dataset cifar10 --eps-min 9/255 --eps-max 0', '--eps-min 9/255 --eps-max 0: the ramp'),
        ('--eps-max 0.2', 'a constant eps is that of --eps'),
        ('--eps-min 0.2', 'a constant eps is that of --eps'),
    ],
)
def test_a_bad_flag_is_named_with_its_value_before_anything_is_written(flags, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        train.main([*flags.split(), '--out', 'run'])
    assert re.search(message, capsys.readouterr().err + str(error.value))
    assert not os.path.exists('run')


@pytest.mark.parametrize(
    'flags, expected',
    [
        (
            'cifar10 --eps-sched linear --periodic',
            'resnet18 8 [100, 50, 50] 8/255 16/255 2/255 10 sgd 0.1 step 0.001 True',
        ),
        (
            'cifar10 --model vgg --eps 4/255 --no-augment --periods 3 2 --lr 0',
            'vgg 8 [3, 2] 4/255 4/255 1/255 10 sgd 0.0 step 0.001 False',
        ),
        (
            'mnist --eps-sched cosine',
            'lenet 16 [100] 0.4 0.6 0.01 50 adam 0.0001 constant 0.0 False',
        ),
        (
            'mnist --eps 0.2 --step-size eps/8',
            'lenet 16 [100] 0.2 0.2 0.025 30 adam 0.0001 constant 0.0 False',
        ),
        ('mnist --eps 0.1', 'lenet 16 [100] 0.1 0.1 0.01 20 adam 0.0001 constant 0.0 False'),
    ],
)
def test_what_no_flag_says_is_as_in_the_paper(flags, expected):
    c = train.settings(train.parser().parse_args(['--dataset', *flags.split()]))
    budgets = [data.show_eps(eps, c.dataset) for eps in (c.eps, c.eps_max, c.step_size)]
    found = [c.model, c.width, c.periods, *budgets, c.n_iter, c.optimizer, c.lr, c.lr_sched]
    assert ' '.join(map(str, [*found, c.weight_decay, c.augment])) == expected
    found = c.batch_size, c.eps_min, c.clock, c.start, c.momentum, c.epochs
    assert found == (128, 0, 'epoch', 'step', 0.9, sum(c.periods))


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit, match='0'):
        train.main(['--help'])
    entries = re.split(r'\n  (?=-)', capsys.readouterr().out.partition('options:')[2])[1:]
    assert len(entries) > 25
    assert all(re.search(r'(  |\n) +\S+', entry) for entry in entries)


@pytest.mark.parametrize('model, precision', [('lenet', 'tf32'), ('resnet18', 'bf16')])
def test_precision_is_that_of_training_and_not_of_the_errors(tiny, monkeypatch, model, precision):
    seen, training_loss, predict = [], train.training_loss, train.predict

    def note(logits):
        tf32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        seen.append((logits.dtype, *tf32))

    def watched_loss(*args):
        loss, logits = training_loss(*args)
        logits.register_hook(note)  # in the backward pass
        return loss, logits

    monkeypatch.setattr(train, 'training_loss', watched_loss)
    monkeypatch.setattr(train, 'predict', lambda *args: note(args[0](args[1])) or predict(*args))
    flags = f'--model {model} --precision {precision} --width 2 --n-train 16 --epochs 1'
    train.main([*tiny, *flags.split(), '--out', 'run'])
    low = torch.bfloat16 if precision == 'bf16' else torch.float32
    assert seen == [(low, True, 'high'), (torch.float32, False, 'highest')]


def test_compilation_changes_no_bit_of_what_is_learnt(tiny, tmp_path, monkeypatch):
    flags = '--n-train 20 --batch-size 12 --n-eval 4 --n-val 8 --ema 0.9 --out'
    argv = [*tiny, *flags.split()]
    train.main([*argv, 'plain'])
    # the tracing, without a C++ compiler
    compiled = mock.Mock(side_effect=functools.partial(torch.compile, backend='eager'))
    monkeypatch.setattr(torch, 'compile', compiled)
    train.main([*argv, 'compiled', '--compile'])
    kwargs = [call.kwargs for call in compiled.call_args_list]
    assert kwargs == [{'dynamic': False, 'mode': 'reduce-overhead'}, {'dynamic': False}]
    assert same(tmp_path / 'compiled', tmp_path / 'plain')

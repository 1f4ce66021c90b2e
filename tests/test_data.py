import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data


def write(path, shape=(28, 28), **changes):
    random, arrays = np.random.default_rng(0), {}
    for split, n in ('train', 200), ('test', 60):
        arrays[f'x_{split}'] = random.integers(0, 256, (n, *shape), np.uint8)
        arrays[f'y_{split}'] = (np.arange(n) % 10).astype(np.uint8)
    np.savez(path, **{key: array for key, array in (arrays | changes).items() if array is not None})
    return arrays


def test_mnist5k_is_5000_real_digits_split_evenly():
    x, y, x_test, y_test = data.load('mnist5k')
    assert y.bincount().tolist() == [400] * 10 and y_test.bincount().tolist() == [100] * 10
    assert len({image.numpy().tobytes() for image in torch.cat([x, x_test])}) == 5000  # distinct
    assert x[y == 0].mean(0)[0, 14, 14] < 0.1 < 0.5 < x[y == 1].mean(0)[0, 14, 14]  # a 0 is hollow


def test_images_in_colour_load_from_their_npz(tmp_path):
    arrays = write(tmp_path / 'cifar10.npz', (32, 32, 3))
    _, _, x, y = data.load('cifar10', tmp_path)
    assert np.array_equal((x * 255).round().numpy(), arrays['x_test'].transpose(0, 3, 1, 2))
    assert np.array_equal(y, arrays['y_test'])


def test_a_foreign_file_is_refused_by_name(tmp_path):
    for key, array, fault in (
        ('y_test', None, 'y_test'),
        ('x_train', np.zeros((199, 28, 28), np.uint8), r'images are uint8 \(199, 28, 28\)'),
        ('x_train', np.zeros((200, 28, 28)), 'images are float64'),
        ('y_train', np.zeros((200, 1), np.uint8), r'labels \(200, 1\)'),
        ('y_test', np.full(60, 10, np.uint8), 'labels are 10 .. 10'),
        ('y_test', np.full(60, -1, np.int8), 'labels are -1 .. -1'),
        ('y_test', np.full(60, 1.5), 'labels are float64'),
        ('x_train', np.ones((200, 28, 28), np.uint8), 'only 0 and 1; multiply'),
    ):
        write(tmp_path / 'mnist.npz', **{key: array})
        with pytest.raises(ValueError, match=f'{tmp_path}/mnist.npz is not mnist: .*{fault}'):
            data.load('mnist', tmp_path)


@pytest.mark.parametrize('begin, end', [(0, 10**9), (30000, 10**9), (0, 100), (5000, 5200)])
def test_a_file_that_lost_bytes_is_refused_by_name_with_the_way_out(tmp_path, begin, end):
    path = tmp_path / 'mnist.npz'
    write(path)
    path.write_bytes(path.read_bytes()[:begin] + path.read_bytes()[end:])
    with pytest.raises(ValueError, match=f'{path} is not mnist: .*; replace it'):
        data.load('mnist', tmp_path)


def test_a_download_loads_as_its_npz_does_or_its_failure_names_the_ways_out(tmp_path, monkeypatch):
    def source(folder, train, download):
        if not arrays:
            raise OSError('resolution failed')
        x, y = (arrays[f'{key}_{"train" if train else "test"}'] for key in 'xy')
        return SimpleNamespace(data=torch.from_numpy(x), targets=y.tolist())

    torchvision = SimpleNamespace(datasets=SimpleNamespace(MNIST=source))
    monkeypatch.setitem(sys.modules, 'torchvision', torchvision)
    arrays = write(tmp_path / 'mnist.npz')
    assert all(map(torch.equal, data.load('mnist', tmp_path / 'a'), data.load('mnist', tmp_path)))
    arrays.clear()
    with pytest.raises(ValueError, match='b/mnist.npz does.*resolution.*--data-dir'):
        data.load('mnist', tmp_path / 'b')


def test_a_digest_is_that_of_every_pixel_and_label():
    x, y = (tensor[:300] for tensor in data.load('mnist5k')[2:])
    brighter, relabelled = x.clone(), y.clone()
    brighter[299, 0, 27, 27] = 1 / 255
    relabelled[299] = 0
    digests = {data.digest(*pair) for pair in ((x, y), (brighter, y), (x, relabelled))}
    assert len(digests) == 3 and data.digest(x.clone(), y) in digests


def test_the_attack_of_training_is_the_runs_at_its_budget_and_the_papers_at_another():
    run = {'dataset': 'mnist', 'eps': 0.4, 'step_size': 0.1, 'n_iter': 5, 'start': 'eps'}
    assert data.pgd_settings(run, 0.4) == {'step_size': 0.1, 'n_iter': 5, 'start': 0.4}
    assert data.pgd_settings(run, 0.1) == {'step_size': 0.01, 'n_iter': 20}


def test_subsets_are_fixed_and_nested():
    some, more = (data.subset(1000, k).tolist() for k in (200, 300))
    assert some == data.subset(1000, 200).tolist() and set(some) < set(more) < set(range(1000))


def test_crop_and_flip_takes_each_shift_of_the_padded_image_straight_and_mirrored():
    image = torch.arange(1.0, 2 * 5 * 5 + 1).view(1, 2, 5, 5)
    padded, possible = torch.nn.functional.pad(image[0], [2] * 4), {}
    for down, right in itertools.product(range(5), range(5)):
        crop = padded[:, down : down + 5, right : right + 5]
        possible |= {crop.numpy().tobytes(): 0, crop.flip(2).numpy().tobytes(): 0}
    crops = data.crops(10000, torch.Generator().manual_seed(0), 2)
    for crop in data.crop_and_flip(image.expand(10000, -1, -1, -1), crops, 2):
        possible[crop.contiguous().numpy().tobytes()] += 1  # KeyError for a crop that is none
    assert len(possible) == 50 and all(130 <= count <= 270 for count in possible.values())

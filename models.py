"""The paper's three networks and their ensemble.

Inputs are images in [0, 1], (N, C, H, W); outputs are logits, (N, n_classes). The authors' released
checkpoints load as they are: state_dicts have their names and shapes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    """Two 5x5 convolutions and two linear layers; 3,274,634 parameters at width 16 on MNIST."""

    default_width = 16

    def __init__(self, width, channels, size, n_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * width, 5, padding=2)
        self.conv2 = nn.Conv2d(2 * width, 4 * width, 5, padding=2)
        self.fc1 = nn.Linear(4 * width * (size // 4) ** 2, 64 * width)
        self.fc2 = nn.Linear(64 * width, n_classes)

    def forward(self, x):
        # pooling commutes with ReLU, which then has a quarter of the values
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class VGG(nn.Module):
    """VGG16 with BatchNorm; 3,686,954 parameters at width 8 on CIFAR10."""

    default_width = 8
    PLAN = (4, 4, 'M', 8, 8, 'M', 16, 16, 16, 'M', 32, 32, 32, 'M', 32, 32, 32, 'M')

    def __init__(self, width, channels, size, n_classes):
        super().__init__()
        layers = []
        for multiple in self.PLAN:
            if multiple == 'M':
                # before the ReLU, as in LeNet; ceil_mode leaves 1 x 1 of 28 x 28, too
                layers.insert(-1, nn.MaxPool2d(2, ceil_mode=True))
            else:
                out = multiple * width
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.feature_extractor = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * math.ceil(size / 32) ** 2, n_classes)

    def forward(self, x):
        return self.classifier(self.feature_extractor(x).flatten(1))


class Block(nn.Module):
    """ResNet's basic block: two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        residual = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        return F.relu_(residual.add_(self.shortcut(x)))


class ResNet18(nn.Module):
    """ResNet18 for small images; 2,797,610 parameters at width 8 (half the usual) on CIFAR10."""

    default_width = 8

    def __init__(self, width, channels, size, n_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * width)
        widths = [4 * width, 4 * width, 8 * width, 16 * width, 32 * width]
        for i, stride in enumerate((1, 2, 2, 2)):
            blocks = Block(widths[i], widths[i + 1], stride), Block(widths[i + 1], widths[i + 1], 1)
            setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))
        self.classifier = nn.Linear(widths[-1], n_classes)

    def forward(self, x):
        x = F.relu_(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(x.mean((2, 3)))


class Ensemble(nn.Module):
    """Log of the mean of the members' probabilities: logsumexp_k(log_softmax(z_k)) - log K.

    As logits, (N, n_classes), it gives the ensemble's cross-entropy, margin and DLR to attacks.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        log_probabilities = torch.stack([F.log_softmax(member(x), 1) for member in self.members])
        return log_probabilities.logsumexp(0) - math.log(len(self.members))


MODELS = {'lenet': LeNet, 'vgg': VGG, 'resnet18': ResNet18}


def build(name, dataset, width):
    """A freshly initialised network MODELS[name] for the images and classes of a `data.Dataset`."""
    return MODELS[name](width, dataset.channels, dataset.size, dataset.n_classes)

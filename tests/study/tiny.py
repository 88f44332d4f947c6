"""A study of a handful of steps: everything happens in it, nothing is learned."""

from __future__ import annotations

from batchnorm.study.config import StudyConfig
from batchnorm.study.settings.batches import Batches
from batchnorm.study.settings.cifar10 import Cifar10
from batchnorm.study.settings.convnet import Convnet
from batchnorm.study.settings.deep import Deep
from batchnorm.study.settings.distribution import Distribution
from batchnorm.study.settings.domains import Domains
from batchnorm.study.settings.headline import Headline
from batchnorm.study.settings.identity import Identity
from batchnorm.study.settings.initialisation import Initialisation
from batchnorm.study.settings.landscape import Landscape
from batchnorm.study.settings.mnist import Mnist
from batchnorm.study.settings.outside import Outside
from batchnorm.study.settings.preprocessing import Preprocessing
from batchnorm.study.settings.whitening import Whitening

TINY = StudyConfig(
    seeds=1,
    headline=Headline(
        seeds=2,
        lrs=(1.0, 2.0),
        tune_steps=6,
        steps=8,
        batch_steps=8,
        hot_steps=4,
        conservative_steps=6,
        wide_steps=4,
        wide_lrs=(1.0,),
        relu_lrs=(0.3,),
        counter_steps=6,
    ),
    deep=Deep(
        layers=2,
        lrs=(1.0,),
        steps=6,
        batch_steps=6,
        plain_depths=(2, 3),
        wide_depths=(2,),
        batch_depths=(1, 3),
        depth_steps=4,
    ),
    distribution=Distribution(steps=160, every=40),
    landscape=Landscape(layers=2, deep_layers=3, sigmoid_steps=6, relu_steps=6, every=2, shifts=2),
    whitening=Whitening(groups=(4,), eigen_groups=(4,), steps=6),
    outside=Outside(toy_steps=10, lrs=(0.3, 1.0), steps=6, every=3, interval=3),
    preprocessing=Preprocessing(table_lrs=(1.0,), table_steps=6, linear_lrs=(10.0, 20.0), linear_steps=4, deep_steps=6),
    identity=Identity(steps=8, points=200, grid=5),
    batches=Batches(sizes=(2, 60), steps=8, class_steps=6, momenta=(0.1, 0.01), looks=(4, 6)),
    domains=Domains(steps=6, draws=1),
    initialisation=Initialisation(seeds=1, layers=(2,), stds=(0.01, 1.0), lrs=(1.0, 3.0), steps=6),
    convnet=Convnet(width=2, deep_width=2, deep_depth=2, lrs=(0.3,), deep_lrs=(0.1, 0.3), steps=6),
    mnist=Mnist(seeds=1, lrs=(0.1, 0.5), steps=6),
    cifar10=Cifar10(seeds=1, width=2, depth=1, lrs=(0.1, 0.3), steps=6),
)

"""Steps recorded as CUDA graphs: refused where they cannot be, and equal to the plain ones where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kit import TINY
from tests.kit.pictures import CLASSES
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import OptimConfig, TrainConfig
from vlprompt.config.teacher import Teacher
from vlprompt.data.batches import TrainingViews
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ConfigError
from vlprompt.methods import METHODS, Can, find_method
from vlprompt.training.loop import Training

TRAINED = sorted(name for name, cls in METHODS.items() if Can.REPLAY_STEPS in cls.Config().can)


def training(method: str, pictures: Path, device: str, precision: str = "fp32", k: int | None = None, **config):
    cls, backbone = find_method(method), load_backbone(str(TINY), device, precision)
    files = sorted((pictures / "train").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    teacher = Teacher(backbone, CLASSES, "a {}.", 20.0) if "teacher_probabilities" in cls.needs else None
    torch.manual_seed(1)
    tuned = cls(backbone, CLASSES, cls.Config()).to(device)
    views = TrainingViews(files, labels, backbone.preprocess, 5, 1, reader=ImageReader(0), patch_size=tuned.patch_size)
    optim = OptimConfig(lr=0.001, warmup_epochs=0)
    return Training(tuned, views, optim, TrainConfig(epochs=3, device=device, **config), None, teacher, k)


def test_graphs_need_a_gpu(pictures):
    with pytest.raises(ConfigError, match=r"train\.graphs needs a GPU \(train\.device = cpu\)"):
        training("coop", pictures, "cpu", graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are recorded as CUDA graphs, which needs a GPU")
@pytest.mark.parametrize(
    ("method", "parts"),
    [(m, n) for m in TRAINED for n in (1, 2) if n == 1 or Can.SPLIT_BATCHES in find_method(m).Config().can],
)
def test_recorded_steps_equal_plain_ones(method, parts, pictures):
    learned = []
    for graphs in (False, True):
        job = training(method, pictures, "cuda", graphs=graphs, accumulate=parts)
        start = [p.detach().clone() for p in job.method.learned()]
        assert job.run()
        learned.append([p - q for p, q in zip(job.method.learned(), start, strict=True)])
    assert any(moved.any() for moved in learned[0])
    for plain, recorded in zip(*learned, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_steps_are_recorded_on_the_gpu_of_the_run(pictures):
    learned = []
    for graphs in (False, True):
        job = training("coop", pictures, "cuda:1", graphs=graphs)
        assert job.run()
        learned.append([p.detach() for p in job.method.learned()])
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are recorded as CUDA graphs, which needs a GPU")
@pytest.mark.parametrize(
    ("method", "precision", "k", "said"),
    [
        ("coop", "fp16", None, "train.graphs records no fp16 steps"),
        ("kdpl_coop", "fp32", 2, "method 'kdpl_coop' does other operations from step to step"),
    ],
)
def test_what_cannot_be_recorded(method, precision, k, said, pictures):
    with pytest.raises(ConfigError, match=said):
        training(method, pictures, "cuda", precision, k, graphs=True)

"""Prompt-OT, CoPrompt, PromptKD, FAP and POUF beyond their golden cases: plans, descriptions, teachers, attacks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.kit.pictures import CLASSES
from tests.kit.runs import StopsAfter, configured, log, prompts
from vlprompt.artefact.artefact import load_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.data.descriptions import read_descriptions
from vlprompt.errors import ConfigError, DataError, Interrupted
from vlprompt.methods import Batch, Method, find_method
from vlprompt.methods.promptot import transport_plan
from vlprompt.training.run import train

NAMES = ("violin", "steam train", "yellow kite", "lamp", "old boot")


def make(backbone: Backbone, name: str, **settings) -> Method:
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(backbone, NAMES, cls.Config(**settings))


def images(backbone: Backbone, n: int = 6) -> torch.Tensor:
    size = backbone.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- Prompt-OT ------------------------------------------------------------------------------------


def test_the_plan_is_the_best_of_all() -> None:
    costs = torch.rand(5, 5, generator=torch.Generator().manual_seed(2))
    plan = transport_plan(costs)
    best = min(sum(costs[i, j].item() for i, j in enumerate(p)) / 5 for p in itertools.permutations(range(5)))
    assert (plan * costs).sum().item() == pytest.approx(best)
    torch.testing.assert_close(plan.sum(0), torch.full((5,), 0.2))
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 0.2))


def test_promptot_does_not_mind_which_frozen_pair_it_goes_to(tiny: Backbone) -> None:
    method, x, y = make(tiny, "promptot"), images(tiny), torch.arange(6) % 5
    v0, order = tiny.encode_images(x), torch.tensor([3, 1, 5, 0, 2, 4])
    out = method(Batch(x, y, v0))
    costs = method.costs(out, Batch(x, y, v0))
    near = (transport_plan(costs) * costs).sum()
    assert near <= costs.diagonal().mean()  # what comparing each image with itself would cost
    changed = method.costs(out, Batch(x, y, v0))[:, order]
    torch.testing.assert_close((transport_plan(changed) * changed).sum(), near)


def test_promptot_reads_one_template_or_all(tiny: Backbone) -> None:
    one, all_ = make(tiny, "promptot"), make(tiny, "promptot", ensemble="imagenet")
    torch.testing.assert_close(one.frozen_classes(NAMES), make(tiny, "zero_shot").class_features(NAMES))
    assert not torch.allclose(one.frozen_classes(NAMES), all_.frozen_classes(NAMES), atol=1e-3)


def test_promptot_is_not_computed_in_parts(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'promptot' compares the images of a batch: it does not allow .*accumulate"):
        configured(pictures, "promptot", **{"train.accumulate": 2})


# --- CoPrompt -------------------------------------------------------------------------------------


def described(tmp_path: Path, **changes: object) -> Path:
    file = tmp_path / "texts.json"
    texts = {name.replace(" ", "_"): [f"{name} is a thing.", f"{name}, seen from far."] for name in CLASSES}
    file.write_text(json.dumps(texts | changes), "utf-8")
    return file


def test_descriptions_are_read_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    file = described(tmp_path, otter=["An otter."], lynx=["A lynx."])
    found = read_descriptions(file, CLASSES[:2], [*CLASSES, "lynx"], said.append)
    assert found == {name: (f"{name} is a thing.", f"{name}, seen from far.") for name in CLASSES[:2]}
    assert said == [f"descriptions {file} have texts of what is no class: 'otter'"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must be a JSON object"),
        ('{"cat": "a cat"}', "must be a JSON object"),
        ('{"cat": ["a cat", 3]}', "3 of 'cat' is no text"),
        ('{"cat": [" "]}', "' ' of 'cat' is no text"),
        ('{"sea horse": ["x"], "sea_horse": ["y"]}', "'sea_horse' is there twice"),
        ('{"cats": ["x"], "dog": []}', r"have no texts of 'cat', 'dog' \(is 'cats' one of these\?\)"),
        ("{", "cannot read descriptions"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "texts.json"
    file.write_text(content, "utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_descriptions(file, ("cat", "dog"))
    assert "\n" not in str(error.value)


def test_coprompt_draws_one_description_of_every_class(tiny: Backbone) -> None:
    method, x = make(tiny, "coprompt"), images(tiny)
    batch = Batch(x, torch.arange(6) % 5, second_view=x + 0.1)
    method.descriptions = {name: [f"{name} {k}" for k in range(2 + (name == "lamp"))] for name in NAMES}
    drawn = {method.draw() for _ in range(50)}
    assert drawn == {0, 1, 2}
    method.draw = lambda: 2  # where others begin again
    assert torch.equal(method.frozen_texts(), tiny.encode_texts([f"{n} {2 if n == 'lamp' else 0}" for n in NAMES]))
    out = method(batch)
    t0, v0 = method.frozen_texts(), tiny.encode_images(x + 0.1)
    cosines = (out.t * t0).sum(-1).mean() + (out.v * v0).sum(-1).mean()
    torch.testing.assert_close(method.regularisers(out, batch)["consistency"], 8 * (2 - cosines))
    squares = (out.t - t0).square().mean() + (out.v - v0).square().mean()
    of_squares = make(tiny, "coprompt", consistency="mse", w=1.0)
    of_squares.descriptions, of_squares.draw = method.descriptions, method.draw
    torch.testing.assert_close(of_squares.regularisers(out, batch)["consistency"], squares)


def test_coprompt_without_adapters_is_maple(tiny: Backbone) -> None:
    method, maple = make(tiny, "coprompt", image_share=0.0, text_share=0.0), make(tiny, "maple")
    torch.testing.assert_close(method.eval().predict(images(tiny), NAMES), maple.eval().predict(images(tiny), NAMES))


def test_coprompt_resumes_with_descriptions(pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, "coprompt", **{"data.descriptions": str(described(tmp_path))})
    said: list[str] = []
    train(config, tmp_path / "whole", say=said.append)
    assert not any("no class descriptions" in text for text in said)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", [StopsAfter(4)])
    train(config, tmp_path / "stopped", resume=True)
    whole, resumed = prompts(tmp_path / "whole"), prompts(tmp_path / "stopped")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole | resumed)
    assert log(tmp_path / "whole") == log(tmp_path / "stopped")
    train(configured(pictures, "coprompt"), tmp_path / "without", say=said.append)
    assert any(text.startswith("coprompt has no class descriptions (data.descriptions)") for text in said)
    assert not torch.equal(prompts(tmp_path / "without")["folded"], whole["folded"])
    assert load_artefact(tmp_path / "whole").descriptions is None


def test_descriptions_are_for_those_who_read_them(pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, "coop", **{"data.descriptions": str(described(tmp_path))})
    with pytest.raises(ConfigError, match=r"^data.descriptions = .*: method 'coop' reads no descriptions$"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

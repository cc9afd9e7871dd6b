"""One image beside transformers: both ways answer alike, and the table says what was measured."""

from __future__ import annotations

import argparse

import pytest

from speed import predict
from vlprompt.errors import BackboneError


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    predict.arguments(parser)
    return parser.parse_args(given)


def test_both_answer_alike() -> None:
    pytest.importorskip("transformers")
    result = predict.run(arguments("mini", "--classes", "3", "--rounds", "1"))
    (row,) = result["rows"]
    assert row["differ_by"] < 1e-5
    for start in ("picture", "pixels"):
        took = row[start]["median_s"]
        assert row[start]["ratio"]["median"] == pytest.approx(took["ours"] / took["transformers"])
    assert predict.table(result).count("| mini | 3 |") == 2


def test_a_patch_size_that_there_is_not() -> None:
    with pytest.raises(BackboneError, match=r"^backbone 'random:x': no patch size \(allowed: random:1 to random:224"):
        predict.run(arguments("random:x"))

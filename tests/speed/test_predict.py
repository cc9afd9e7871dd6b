"""Images a second beside transformers and ONNX: all answer alike, and the table says what was measured."""

from __future__ import annotations

import argparse

import pytest

from speed import predict
from tests.kit.marks import slow
from vlprompt.errors import BackboneError


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    predict.arguments(parser)
    return parser.parse_args(given)


@slow
def test_all_answer_alike() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    result = predict.run(arguments("mini", "--classes", "3", "--batches", "1,2", "--rounds", "1"))
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert max(row["differ_by"]["transformers"], row["differ_by"]["onnx"]) < 1e-5
        for start in ("picture", "pixels"):
            took = row[start]["median_s"]
            assert row[start]["ratio"]["ours"]["median"] == pytest.approx(took["transformers"] / took["ours"])
        took = row["pixels"]["median_s"]
        assert row["pixels"]["ratio"]["onnx"]["median"] == pytest.approx(took["ours"] / took["onnx"])
    assert predict.table(result).count("| mini | 2 |") == 2


def test_a_patch_size_that_there_is_not() -> None:
    with pytest.raises(BackboneError, match=r"^backbone 'random:x': no patch size \(allowed: random:1 to random:224"):
        predict.run(arguments("random:x"))

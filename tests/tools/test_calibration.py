"""The page on calibration: its tables are made of committed figures."""

from __future__ import annotations

import calibration
import pytest

ROW = {
    "data": "photos", "method": "coop", "accuracy": 61.25, "ece_before": 0.25, "ece_after": 0.0625,
    "auroc_maximum probability": 0.75, "auroc_energy": 0.5, "novel_ece_before": 0.5, "novel_ece_temperature": 0.125,
    "novel_ece_dac": 0.375, "novel_ece_after": 0.25, "dac_factor": 1.5,
    **{f"coverage_{asked}": asked for asked in calibration.COVERAGES},
    **{f"coverage_by_class_{asked}": 1.0 for asked in calibration.COVERAGES},
}  # fmt: skip


def test_tables_say_what_was_measured() -> None:
    line = calibration.accuracy_table([ROW]).splitlines()[-1]
    assert line == (
        "| photos | `coop` | 61.2 | 0.250 | 0.062 | 0.800 / 0.900 / 0.950 | 1.000 / 1.000 / 1.000 | 0.750 / 0.500 |"
    )
    assert calibration.names_table([ROW]).splitlines()[-1] == (
        "| photos | `coop` | 0.500 | 0.125 | 0.375 | 0.250 | 1.50 |"
    )
    assert "–" in calibration.names_table([ROW | {"dac_factor": None}])


def test_methods_without_other_names_are_in_one_table_only() -> None:
    head = {key: value for key, value in ROW.items() if not key.startswith("novel") and key != "dac_factor"}
    assert "photos" in calibration.accuracy_table([head])
    assert "photos" not in calibration.names_table([head])


def test_the_page_has_the_committed_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert (calibration.page(check=True), capsys.readouterr().out) == (0, "")

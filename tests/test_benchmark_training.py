"""The benchmark of training: every row is measured, and its numbers fit together."""

import json
from functools import partial

from capsjax.models import CapsNet
from experiments import benchmark_training

SMALL = partial(CapsNet, conv_channels=4, primary_types=2, hidden=(8,))


def test_rows_are_measured_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark_training, "CapsNet", SMALL)
    monkeypatch.setattr(benchmark_training, "MATRIX", 16)
    output = tmp_path / "rows.jsonl"
    config = benchmark_training.Config(batch_size=2, image_size=17, repeats=2, output=str(output))
    assert benchmark_training.main(config) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["row"] for row in rows][:2] == ["training step", "inference"]
    assert len(rows) == 8
    printed = capsys.readouterr().out
    for row in rows:
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["row"] in printed
    assert rows[0]["images_per_second"] == 2 / rows[0]["median"]

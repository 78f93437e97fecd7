"""The program of docs/interests.md trains, exports and answers on generated users."""

import pathlib
import re

import jax
import pytest

from experiments.data import interactions

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "interests.md"


def test_the_plain_jax_model_trains_exports_and_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [program] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    data = interactions.synthetic(num_users=60, num_items=60, num_clusters=4)
    monkeypatch.setattr(interactions, "load", lambda *_, **__: data)
    small = program.replace("EPOCHS = 20", "EPOCHS = 2").replace("BATCH = 256", "BATCH = 32")
    assert small.count("= 2\n") == 1
    exec(compile(small, str(PAGE), "exec"), {})
    first, second, answer = capsys.readouterr().out.splitlines()
    assert "epoch 1" in first
    assert float(second.split()[3]) < float(first.split()[3])
    assert len(answer.split()) == 10
    assert set(answer.split()) <= set(data.item_ids)
    assert jax.export.deserialize(bytearray((tmp_path / "mind.jax_export").read_bytes()))

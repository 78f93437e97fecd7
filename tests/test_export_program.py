"""export: both files of a run give what its network gives, and other networks are refused."""

import in_process
import jax
import numpy as np
import small_runs

from capsjax import lengths, models
from experiments import export
from experiments.training import trained


def test_both_files_give_what_the_network_gives(tmp_path, monkeypatch, capsys):
    data_dir = small_runs.write_digits(tmp_path / "digits", size=20)
    workdir = small_runs.save_run(tmp_path / "run", data_dir)
    run = trained.load(workdir)
    (tmp_path / "digits").rename(tmp_path / "away")
    output = tmp_path / "output"
    flags = {"workdir": workdir, "output": output}
    assert in_process.run(export, flags, monkeypatch, capsys)[0] == 0
    images = run.test.images[:3] / np.float32(255)
    expected = np.asarray(run.model(images))
    np.testing.assert_array_equal(models.load(output)(images), expected)
    program = jax.export.deserialize(bytearray((output / "network.jax_export").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    found = program.call(images)
    np.testing.assert_allclose(found["capsules"], expected, atol=1e-6)
    np.testing.assert_allclose(found["lengths"], lengths(expected), atol=1e-6)
    wanted = run.model.reconstruct(expected)
    np.testing.assert_allclose(found["reconstructions"], wanted, atol=1e-6)


def test_a_cnn_is_refused(tmp_path, monkeypatch, capsys):
    data_dir = small_runs.write_digits(tmp_path / "digits", size=20, side=28)
    workdir = small_runs.save_run(tmp_path / "run", data_dir, network="pooling_cnn")
    status, _, stderr = in_process.run(export, {"workdir": workdir}, monkeypatch, capsys)
    message = f"export: workdir {workdir} holds a pooling_cnn, no CapsNet\n"
    assert (status, stderr) == (2, message)

"""Files of the benchmarks: whole or not at all, and locked by the processes that work on them."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from benchmarks.shared.files import alone, claimed, load, read, replacing, save, scratch, sweep, write_atomically

UNFINISHED = "*.wdefense-unfinished"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_every_part_of_a_file_is_unreadable(share, tmp_path, capsys):
    save(tmp_path / "weights.pt", {"a": torch.arange(300.0), "b": torch.zeros(2, 2)})
    write_atomically(tmp_path / "record.json", {"a": list(range(300))})
    assert load(tmp_path / "weights.pt")["a"][-1] == 299
    assert read(tmp_path / "record.json")["a"][-1] == 299
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert load(tmp_path / "weights.pt") is None
    assert read(tmp_path / "record.json") == {}
    assert capsys.readouterr().err.count("cannot be read, and counts as absent") == 2
    assert load(tmp_path / "none.pt") is None
    assert read(tmp_path / "none.json") == {}
    assert not capsys.readouterr().err


def test_what_a_process_works_on_is_its_own_until_it_is_dead(tmp_path):
    """A real ``kill -9``, in the middle of a file and of a scratch folder."""
    write_atomically(tmp_path / "record.json", {"old": 1})
    ready, say = os.pipe()
    if (child := os.fork()) == 0:  # it touches files alone: PyTorch's threads are not there
        signal.alarm(30)  # should this test fail before it kills it
        with claimed(tmp_path / "lock"), alone(tmp_path / "record.json"), scratch(tmp_path) as folder:
            (folder / "epoch=1.ckpt").write_text("checkpoint")
            with replacing(tmp_path / "record.json") as file:
                file.write(b'{"new":')
                file.flush()
                os.write(say, b"!")
                signal.pause()
        os._exit(0)
    os.close(say)
    assert os.read(ready, 1) == b"!"
    sweep(tmp_path)
    with scratch(tmp_path) as ours:
        assert len(list(tmp_path.glob(UNFINISHED))) == 3
    assert not ours.exists()
    with claimed(tmp_path / "lock") as free:
        assert not free
    with pytest.raises(SystemExit, match=r"Another process works on .*record\.json"), alone(tmp_path / "record.json"):
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert read(tmp_path / "record.json") == {"old": 1}
    with claimed(tmp_path / "lock") as free, alone(tmp_path / "record.json"):
        assert free
        write_atomically(tmp_path / "other.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "other.json", "record.json", "record.lock"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "record.json", {"old": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_atomically(tmp_path / "record.json", {"new": torch.zeros(1)})
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save(tmp_path / "record.json", lambda: None)
    assert read(tmp_path / "record.json") == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1

"""metrics.jsonl and the TensorBoard files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.runtime import read_metrics
from jaxalign.runtime.metrics import MetricsLog, to_line

DTYPES = [np.float64, np.float32, np.float16, jnp.bfloat16, np.int32, np.uint8, np.bool_]


def write(directory, metrics, steps=0, tensorboard=False):
    count = len(next(iter(metrics.values())))
    with MetricsLog(directory, steps=steps, tensorboard=tensorboard) as log:
        log.write(steps, metrics, count)
        log.sync()


def test_line_by_hand():
    line = to_line(3, {"loss": np.float32(0.3), "kl": np.float32(np.nan), "lanes": np.array([1.5, -np.inf, 2.0])})
    assert line == (
        '{"step": 3, "loss": 0.3, "kl": null, "lanes": [1.5, null, 2.0], '
        '"nonfinite": {"kl": ["nan"], "lanes": ["-inf"]}}\n'
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_numbers_come_back_with_the_same_bits(tmp_path, dtype):
    words = np.random.default_rng(0).integers(0, 256, (60, 3, np.dtype(dtype).itemsize), np.uint8)
    values = (words[..., 0] > 127) if dtype is np.bool_ else words.view(dtype)[..., 0]
    write(tmp_path, {"x": values, "y": values[:, 0]})
    back = read_metrics(tmp_path)
    for name, written in (("x", values), ("y", values[:, 0])):
        assert back[name].astype(dtype).dtype == dtype
        # Widened for the comparison only: NumPy does not take two bfloat16 NaNs for equal.
        with np.errstate(invalid="ignore"):  # signalling NaNs among the random bits
            np.testing.assert_array_equal(back[name].astype(dtype).astype(np.float64), written.astype(np.float64))
    assert back["step"].tolist() == list(range(60))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_going_on_drops_what_lies_past_the_checkpoint(tmp_path):
    write(tmp_path, {"x": np.arange(10.0)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "x": 1')
    assert read_metrics(tmp_path)["x"].tolist() == list(range(10))
    write(tmp_path, {"x": np.array([60.0, 70.0])}, steps=6)
    assert read_metrics(tmp_path / "metrics.jsonl")["x"].tolist() == [0, 1, 2, 3, 4, 5, 60, 70]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ('{"step": 2, "x": 1.0}', "metrics.jsonl:2: expected step 1, found 2"),
        ('{"step": 1, "y": 1.0}', "metrics.jsonl:2: metrics"),
        ('{"step": 1', "metrics.jsonl:2: not JSON"),
        ("[1]", "metrics.jsonl:2: not a step's metrics"),
    ],
)
def test_bad_lines_are_named(tmp_path, second, said):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0, "x": 1.0}}\n{second}\n')
    with pytest.raises(ValueError, match=said):
        read_metrics(tmp_path)


def test_reserved_name(tmp_path):
    with pytest.raises(ValueError, match="may not be named 'step'"):
        write(tmp_path, {"step": np.zeros(2)})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)


def test_tensorboard_holds_scalars_and_lanes(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, {"loss": np.array([3.0, 2.0]), "lanes": np.array([[1.0, 2.0], [3.0, 5.0]])}, tensorboard=True)
    found = {}
    for path in (tmp_path / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:
            # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    assert found == {
        ("loss", 0): 3.0, ("loss", 1): 2.0, ("lanes", 0): 1.5, ("lanes", 1): 4.0,
        ("lanes/0", 0): 1.0, ("lanes/1", 0): 2.0, ("lanes/0", 1): 3.0, ("lanes/1", 1): 5.0,
    }  # fmt: skip

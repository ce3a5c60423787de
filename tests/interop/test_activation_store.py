"""Text packed into rows, and the activations of a tiny model over it: kept, cut short, resumed, shuffled."""

import gzip
import json

import jax
import numpy as np
import pytest

from jaxalign.interop.activation_store import ActivationStore, collect_activations, shard_path
from jaxalign.interop.byte_tokenizer import ByteTokenizer
from jaxalign.interop.row_files import RowFileError
from jaxalign.interop.text_tokens import pack_tokens, python_documentation, read_documents
from jaxalign.interpretability.activations import capture
from jaxalign.networks.transformer import TransformerConfig, transformer

CONFIG = TransformerConfig(
    vocab_size=259, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)
NETWORK = transformer(CONFIG)
SITES = ("resid_post[0]", "attention_z[1]")
PACKED = pack_tokens(["the cat sat on the mat", "and the dog sat on the cat"] * 6, ByteTokenizer(), length=16)
OPTIONS = {"sites": SITES, "excluded": PACKED.special, "rows_per_call": 2, "rows_per_shard": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def params():
    return jax.jit(NETWORK.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def whole(params):
    """What an uncut capture of all rows gives, by site [N, T, D]."""
    found = jax.jit(capture(NETWORK, SITES).apply)(params, PACKED.tokens)[1]
    return [np.asarray(found[name]).reshape(*PACKED.tokens.shape, -1) for name in SITES]


@pytest.fixture(scope="module")
def store(params, tmp_path_factory):
    return collect_activations(tmp_path_factory.mktemp("store"), NETWORK, params, PACKED.tokens, **OPTIONS)


def test_packing_by_hand():
    tokenizer = ByteTokenizer()
    packed = pack_tokens(["abc", "de", "fgh"], tokenizer, length=4)
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert packed.tokens.tolist() == [[begin, *b"abc"], [begin, end, *b"de"], [begin, end, *b"fg"]]
    assert (packed.special, packed.documents) == ((begin, end), 3)
    first = pack_tokens(["abc", "de", "fgh"], tokenizer, length=4, limit=5)
    assert (first.tokens.tolist(), first.documents) == ([[begin, *b"abc"]], 1)
    with pytest.raises(ValueError, match="too few for one row of 40"):
        pack_tokens(["abc"], tokenizer, length=40)


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("One text.\n\nStill the same.")
    assert read_documents(tmp_path / "a.txt") == ["One text.\n\nStill the same."]
    rows = [
        {"text": "plain"},
        {"prompt": "Q: ", "chosen": "A", "rejected": "B"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "..."},
        {"messages": [{"role": "user", "content": "hello"}]},
    ]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    assert read_documents(tmp_path / "b.jsonl.gz", ByteTokenizer()) == [
        "plain", "Q: A", "\n\nHuman: hi\n\nAssistant: ho", "user: hello"
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"title": 1}\n')
    with pytest.raises(RowFileError, match=r"c\.jsonl, line 2: the row is neither text nor an object with one of text"):
        read_documents(tmp_path / "c.jsonl")
    assert sum(map(len, python_documentation())) > 300_000


def test_the_store_holds_what_the_model_computes(store, whole):
    kept = ~np.isin(PACKED.tokens, PACKED.special)
    assert len(store) == kept.sum() == (kept[:, 1:]).sum()
    assert store.sizes == (8, 8)
    assert (np.diff(store.place) > 0).all()
    index = np.array([len(store) - 1, 0, 40, 3])
    for found, expected in zip(store.read(index), whole, strict=True):
        flat = expected.reshape(-1, expected.shape[-1])
        np.testing.assert_allclose(found, flat[store.place[index]], rtol=1e-5, atol=1e-6)
    everything = store.read(np.arange(len(store)))[0]
    np.testing.assert_allclose(store.norms(), np.linalg.norm(everything, axis=1), rtol=1e-6)


def test_batches_are_a_function_of_seed_and_step_and_epochs_hold_each_activation_once(store):
    among = np.arange(10, 40)
    batch = store.batches(batch_size=10, seed=1, among=among)
    epoch = np.concatenate([batch(step)[0] for step in range(3)])
    np.testing.assert_array_equal(batch(1)[0], epoch[10:20])
    fresh = store.batches(batch_size=10, seed=1, among=among)
    np.testing.assert_array_equal(fresh(4)[1], batch(4)[1])
    expected = store.read(among)[0]
    np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(expected, axis=0))
    assert not np.array_equal(epoch, expected)
    assert not np.array_equal(np.concatenate([batch(step)[0] for step in range(3, 6)]), epoch)
    with pytest.raises(ValueError, match="batch_size 31 of 30"):
        store.batches(batch_size=31, seed=1, among=among)


def test_a_cut_run_goes_on_and_redoes_a_half_written_shard(store, params, tmp_path):
    collect_activations(tmp_path, NETWORK, params, PACKED.tokens, **OPTIONS)
    good, short = shard_path(tmp_path, 0, 0), shard_path(tmp_path, 1, 1)
    marked = np.load(good)
    marked[0] = 7  # to see that it is not done again
    np.save(good, marked)
    short.write_bytes(short.read_bytes()[:-40])
    shard_path(tmp_path, 0, 2).rename(shard_path(tmp_path, 0, 2).with_suffix(".part"))
    with pytest.raises(ValueError, match=r"not finished: site0-shard00002\.npy is missing"):
        ActivationStore(tmp_path)
    again = collect_activations(tmp_path, NETWORK, params, PACKED.tokens, **OPTIONS)
    for found, expected in zip(again.read(np.arange(1, len(store))), store.read(np.arange(1, len(store))), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again.read(np.array([0]))[0], np.full((1, 8), 7))
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="another run: dtype, fingerprint differ"):
        changed = {**OPTIONS, "dtype": "float16", "fingerprint": {"model": "b"}}
        collect_activations(tmp_path, NETWORK, params, PACKED.tokens, **changed)


def test_bfloat16_on_disk(store, params, tmp_path):
    half = collect_activations(tmp_path, NETWORK, params, PACKED.tokens[:4], **{**OPTIONS, "dtype": "bfloat16"})
    index = np.arange(len(half))
    np.testing.assert_allclose(half.read(index)[0], store.read(index)[0], rtol=2**-8, atol=1e-6)
    assert shard_path(tmp_path, 0, 0).stat().st_size == 128 + 2 * 8 * len(half)


def test_bad_input_is_named(params, tmp_path):
    def collect(params=params, **changes):
        return collect_activations(tmp_path / "bad", NETWORK, params, PACKED.tokens[:4], **{**OPTIONS, **changes})

    with pytest.raises(ValueError, match=r"no site 'resid_pots\[0\]'; the sites .* resid_post"):
        collect(sites=("resid_pots[0]",))
    with pytest.raises(ValueError, match=r"resid_post is \(2, 2, 16, 8\) for tokens \(2, 16\).*resid_post\[0\]"):
        collect(sites=("resid_post",))
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, got 'int8'"):
        collect(dtype="int8")
    with pytest.raises(ValueError, match="skip must lie in 0"):
        collect(skip=16)
    for factor, why in ((np.nan, r"infinite \(first at row 0, position 1"), (1e8, "in float16: choose bfloat16")):
        broken = {**params, "embedding": params["embedding"] * factor}
        with pytest.raises(ValueError, match=rf"at resid_post\[0\] are .*{why}"):
            collect(broken, sites=SITES[:1], dtype="float16")
    with pytest.raises(FileNotFoundError, match="holds no activation store"):
        ActivationStore(tmp_path)

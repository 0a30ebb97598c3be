from __future__ import annotations

import json

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from mlx_tune.errors import InvalidArgumentError, MlxTuneError
from mlx_tune.lm.capacity.configuration import read_configuration

CONFIG = {"model_type": "llama", "scale": {"__float__": "Infinity"}}


def test_a_configuration_is_read_from_wherever_it_is(tmp_path):
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "Other.json").write_text(json.dumps(CONFIG))
    read = {"model_type": "llama", "scale": float("inf")}
    for place, name in ((folder, "My-Model"), (folder / "config.json", "My-Model"), (tmp_path / "Other.json", "Other")):
        described = read_configuration(place)
        assert (described.name, described.config, described.folder) == (name, read, None)
    assert read_configuration({"model_type": "llama"}).name == "llama"
    (folder / "model.safetensors").touch()
    assert read_configuration(folder).folder == folder


def test_what_nvidia_says_of_quantization_in_a_file_of_its_own_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert read_configuration(tmp_path).config["quantization_config"]["quant_method"] == "modelopt"


@pytest.mark.parametrize(
    ("text", "message"), [("[", "is not JSON"), ("[]", "holds no settings"), (None, "holds no config.json")]
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        read_configuration(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/place", "./here", "word", "a/b/c"])
def test_what_is_neither_a_place_nor_a_hub_name_is_refused(name):
    with pytest.raises(InvalidArgumentError, match="no file or folder here"):
        read_configuration(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "is gated: .* Accept it on huggingface.co/owner/name"),
        (RepositoryNotFoundError, "no model 'owner/name'"),
        (LocalEntryNotFoundError, "could not be asked for its config.json"),
        (OSError, r"did not give the config.json of 'owner/name' \(OSError: no"),
    ],
)
def test_the_hubs_refusals_are_told_apart(monkeypatch, error, message):
    def refuse(*_, **__):
        raised = error.__new__(error)
        Exception.__init__(raised, "no")
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(MlxTuneError, match=message):
        read_configuration("owner/name")


def test_of_a_hub_name_one_file_is_fetched(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def fetch(name, file, revision):
        asked.append((name, file, revision))
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert read_configuration("owner/name", "v2").name == "name"
    assert asked == [("owner/name", "config.json", "v2")]

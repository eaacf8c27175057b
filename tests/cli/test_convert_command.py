"""`looplm convert`: each direction from a real run, and its errors in one line."""

import json

import pytest

from looplm_jax.cli.main import main


def run(capsys, *arguments):
    status = main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Returns the run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert main(["convert", "to-hf", str(trained), str(folder), "--max-shard-size", "1KB"]) == 0
    return folder


def test_to_hf_says_what_it_wrote_and_what_to_type_next(trained, tmp_path, capsys):
    status, out, err = run(capsys, "to-hf", trained, tmp_path / "model")
    assert (status, err) == (0, "")
    assert "wrote step 4" in out
    assert "modeling_looplm.py" in out
    assert out.splitlines()[-1].startswith("next: ")


def test_there_and_back(exported, tmp_path, capsys):
    assert len(list(exported.glob("*.safetensors"))) > 1
    status, out, _ = run(capsys, "from-hf", exported, tmp_path / "back")
    assert status == 0
    assert f"next: looplm generate {tmp_path / 'back'}" in out
    assert main(["inspect", str(tmp_path / "back")]) == 0
    status, _, _ = run(capsys, "to-hf", tmp_path / "back", tmp_path / "again", "--max-shard-size", "1KB")
    assert status == 0
    for file in exported.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (exported / "config.json").read_text()
    )


def test_upcycle(trained, tmp_path, capsys):
    status, out, _ = run(capsys, "upcycle", trained, tmp_path / "deep", "--layers", 2, "--order", "stack")
    assert status == 0
    assert "--model.num_layers 2 --start.checkpoint" in out
    assert main(["inspect", str(tmp_path / "deep")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which way: looplm convert from-hf, to-hf, upcycle or from-dense"),
        (["form-hf"], "invalid choice: 'form-hf'"),
        (["from-hf", "nowhere", "out"], "nowhere"),
        (["to-hf", "{trained}", "out", "--max-shard-size", "lots"], "lots"),
        (["to-hf", "{trained}", "{trained}"], "is not empty"),
        (["upcycle", "{trained}", "out", "--layers", "1"], "cannot become 1"),
        (["upcycle", "{trained}", "out", "--layers", "2", "--ordr", "stack"], "did you mean '--order'"),
        (
            ["from-dense", "{exported}", "out"],
            "holds a looped model already; convert it as one: looplm convert from-hf",
        ),
    ],
)
def test_mistakes_end_in_one_line(trained, exported, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(trained=trained, exported=exported) for argument in arguments]
    status, _, err = run(capsys, *filled)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()

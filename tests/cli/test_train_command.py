"""Arguments of `looplm train`: their meaning, and errors before anything is written."""

import json
import os
from pathlib import Path

import pytest

from looplm_jax import codec
from looplm_jax.cli import train as train_command
from looplm_jax.cli.main import main
from looplm_jax.config import Recipe, Schedule
from looplm_jax.data.tokenizers import train_sentencepiece
from looplm_jax.distributed import SingleProcess
from looplm_jax.errors import UserError
from looplm_jax.recipes import RECIPES, named_recipe

ADJECTIVES, NOUNS = ("deep", "shared", "looped", "gated", "early"), ("layer", "state", "exit", "token", "step", "loss")
TEXT = "\n\n".join(
    f"Paragraph {n}. " + " ".join(f"{ADJECTIVES[n * k % 5]} {NOUNS[(n + k) % 6]}," for k in range(30))
    for n in range(200)
)


def dry_run(capsys, *arguments) -> Recipe:
    assert main(["train", "--dry-run", *arguments]) == 0
    return codec.from_dict(Recipe, json.loads(capsys.readouterr().out))


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Returns the one line with which a command ends, and checks that it wrote nothing in its working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["train", *arguments]) == 2
        printed = capsys.readouterr()
        *progress, last = printed.err.splitlines()
        assert not [line for line in progress if "writing to" not in line and not line.startswith("reading ")]
        assert printed.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        assert last.startswith("looplm: ")
        return last.removeprefix("looplm: ")

    return run


def test_help_lists_every_field_with_its_value(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for leaf in codec.leaves(named_recipe("text-small")):
        assert f"--{leaf.path} " in printed
        assert leaf.help in printed
    assert all(name in printed for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_prints_the_recipe(name, capsys):
    assert dry_run(capsys, "--recipe", name) == named_recipe(name)


def test_a_printed_recipe_can_be_given_back(capsys, tmp_path):
    arguments = ["--data", "a.txt", "--data", "b/*.jsonl", "--tokenizer", "t.model", "--on-bad-record", "skip"]
    recipe = dry_run(
        capsys, *arguments, "--model.width=128", "--stage.beta", "0.2", "--stages.gate.steps", "30",
        "--stages.gate.warmup_steps", "0", "--mesh.data", "-1", "--stages.pretrain.schedule", "cosine", "--seed", "7",
    )  # fmt: skip
    assert [source.path for source in recipe.data.sources] == ["a.txt", "b/*.jsonl"]
    assert (recipe.model.width, recipe.model.head_width, recipe.seed) == (128, 32, 7)
    assert [stage.beta for stage in recipe.stages] == [0.2, 0.2]
    assert (recipe.stages[0].schedule, recipe.stages[1].steps) == (Schedule.COSINE, 30)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(codec.to_dict(recipe)))
    assert dry_run(capsys, "--recipe", str(path)) == recipe


def test_heads_follow_the_width_unless_they_are_set(capsys):
    model = dry_run(capsys, "--model.num_heads", "8").model
    assert (model.kv_heads, model.head_width) == (8, 32)
    model = dry_run(capsys, "--model.num_heads", "8", "--model.num_kv_heads", "2", "--model.head_dim", "16").model
    assert (model.kv_heads, model.head_width) == (2, 16)


MISTAKES = [
    (["--recipe", "text-smal"], "unknown recipe 'text-smal'; did you mean 'text-small'?"),
    (["--recipe", "mine"], "unknown recipe 'mine'; give the path of a .json file, or one of "),
    (["--recipe", "missing.json"], "there is no recipe missing.json; name a file, or one of text-small, demo, "),
    (["--recipe", "mano-smal.json"], "there is no recipe mano-smal.json; did you mean 'mano-small'?"),
    (["--recipe"], "argument --recipe: expected one argument; see `looplm train --help`"),
    (["--recipie", "demo"], "unknown flag '--recipie'; did you mean '--recipe'?"),
    (["--x", "red"], "unknown flag '--x'; `looplm train --help` lists them"),
    (["--log_evry", "3"], "unknown flag '--log_evry'; did you mean '--log_every'?"),
    (["--model.widht", "3"], "unknown field 'model.widht'; did you mean 'model.width'?"),
    (["--stage.betta", "3"], "unknown field 'stage.betta'; did you mean 'stage.beta'?"),
    (["--stages.pretrian.beta", "3"], "unknown field 'stages.pretrian.beta'; did you mean 'stages.pretrain.beta'?"),
    (["--a.b", "3"], "unknown field 'a.b'; `--help` lists them"),
    (["--model.width"], "--model.width needs a value"),
    (["--model.width", "--seed", "3"], "--model.width needs a value"),
    (["stray"], "unexpected argument 'stray'; fields are set with --name value"),
    (["--model.width", "wide"], "model.width: expected a whole number, got 'wide'"),
    (["--stage.beta", "nan"], "stages.0.beta: expected a finite number, got 'nan'"),
    (["--model.tied_head", "maybe"], "model.tied_head: expected true or false, got 'maybe'"),
    (["--model.injection", "ad"], "model.injection: no such choice 'ad'; did you mean 'add'?"),
    (["--on-bad-record", "ignore"], "argument --on-bad-record: invalid choice: 'ignore'"),
    (["--model.num_heads", "3"], "model.num_heads=3 does not divide model.width=256; change one of them"),
    (["--model.num_kv_heads", "3"], "model.num_kv_heads=3 does not divide model.num_heads=4"),
    (["--model.loops", "0"], "model.loops must be at least 1, not 0"),
    (["--stage.loops", "0"], "stages.pretrain.loops must be at least 1, not 0"),
    (["--stage.accumulation", "3"], "stages.pretrain.accumulation=3 does not divide stages.pretrain.batch_size=8"),
    (["--stage.sequence_length", "9999"], "stages.pretrain.sequence_length=9999 is beyond model.max_positions=4096"),
    (["--stage.steps", "5"], "stages.pretrain: warmup_steps and decay_steps must fit in steps=5"),
    ([], "there is nothing to train on; say --data 'mine/*.jsonl'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistaken_argument_is_one_line(arguments, message, refused):
    assert refused(*arguments).startswith(message)


def test_a_recipe_that_is_none(refused, tmp_path):
    Path("broken.json").write_text('{"name": ')
    assert refused("--recipe", "broken.json").startswith("broken.json is not JSON: Expecting value")
    Path("other.json").write_text('{"name": "x", "modell": {}}')
    assert refused("--recipe", "other.json").startswith("unknown field 'modell'; did you mean 'model'?")
    Path("less.json").write_text('{"name": "x"}')
    assert refused("--recipe", "less.json") == "missing field 'model'"


DATA_MISTAKES = [
    ({}, "missing/*.jsonl", "no file matches 'missing/*.jsonl'; check the path, and quote a glob"),
    ({"empty.txt": b""}, "empty.txt", "empty.txt: the 1 files hold no text; give files with text in them"),
    ({"latin.txt": b"caf\xe9"}, "latin.txt", "{folder}/latin.txt: not UTF-8 at byte 3; fix it, or skip such"),
    ({"a.jsonl": b'{"text": "x"}\n{"text": \n'}, "a.jsonl", "{folder}/a.jsonl:2: not JSON (Expecting value at column"),
    ({"a.parquet": b"PAR1"}, "a.parquet", "{folder}/a.parquet: not a Parquet file"),
    ({"one.txt": b"a short text"}, "one.txt", "none of the 1 documents is held out at data.validation_fraction=0.02"),
    ({}, "man:length=3", "no such task 'man'; did you mean 'mano'?"),
    ({}, "mano:lenght=3", "unknown field 'mano.lenght'; did you mean 'length'?"),
]


@pytest.mark.parametrize(("files", "data", "message"), DATA_MISTAKES)
def test_bad_data_is_one_line(files, data, message, refused, tmp_path):
    for name, content in files.items():
        Path(name).write_bytes(content)
    assert refused("--data", data).startswith(message.format(folder=tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_that_may_not_be_read(refused, tmp_path):
    Path("secret.txt").write_text(TEXT)
    Path("secret.txt").chmod(0)
    assert refused("--data", "secret.txt").startswith(f"{tmp_path}/secret.txt: cannot be read (Permission denied)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh.data", "16"], "a mesh of data=16 does not fit 8 device(s); change mesh.* or set one axis to -1"),
        (
            ["--stage.batch_size", "12"],
            "stages.pretrain.batch_size=12 in 1 microbatch(es) does not divide",
        ),
        (["--mesh.data", "1", "--mesh.tensor", "8"], "mesh.tensor=8 does not divide model.num_heads=4"),
    ],
)
def test_shapes_that_do_not_fit_the_devices(arguments, message, refused):
    assert refused("--data", "mano", *arguments).startswith(message)


def ends_with(capsys, arguments, message):
    """Checks that the command fails after it has claimed its folder, with one line below its progress."""
    assert main(["train", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith(f"looplm: {message}"), printed
    assert sum(line.startswith("looplm: ") for line in printed.splitlines()) == 1


def test_tokenizers_that_do_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    book = ["--data", "a.txt", "--data.validation_fraction", "0.2"]
    ends_with(capsys, [*book, "--tokenizer", "none.model"], "none.model: there is no such file")
    Path("other.model").write_bytes(train_sentencepiece([TEXT], 300).serialize())
    ends_with(
        capsys, [*book, "--tokenizer", "other.model", "--model.vocab_size", "299"], "the tokenizer has 300 tokens"
    )
    ends_with(capsys, book, "there is too little text for a vocabulary of 4096: it gives at most")
    ends_with(capsys, ["--data", "mano", "--tokenizer", "other.model"], "'mano' has a vocabulary of its own; leave")
    assert {path.name for path in Path("runs/text-small").iterdir()} == {"config.json"}


def test_a_platform_that_is_not_here_ends_all_processes(monkeypatch, tmp_path):
    ended = []

    class Ended(Exception):
        pass

    class Two(SingleProcess):
        count = 2

        def abort_all(self, message, status):
            ended.append((message, status))
            raise Ended

    def refuse():
        raise UserError("JAX cannot use the platform")

    monkeypatch.setattr(train_command, "join", lambda _: Two())
    monkeypatch.setattr(train_command, "require_platform", refuse)
    with pytest.raises(Ended):
        train_command.run_training(named_recipe("text-small"), tmp_path / "run")
    assert ended == [("JAX cannot use the platform", 2)]

"""Token settings of a folder are used, kept in checkpoints and exported again; no weights are needed."""

import json

import pytest
from hf_folders import tokenizer_json

from looplm_jax.convert._export_hf import _generation_config
from looplm_jax.convert._tokenizer_files import CHAT_TEMPLATE, has_other_chat_template, stop_ids, tokenizer_files
from looplm_jax.data import Message, tokens_and_mask
from looplm_jax.data.tokenizers import JsonTokenizer, deserialize, load_tokenizer
from looplm_jax.data.tokenizers._folder import read_folder_tokenizer
from looplm_jax.errors import UserError

pytest.importorskip("tokenizers")
START, END = "<|im_start|>", "<|im_end|>"


def read(folder, content=None, **files):
    """Returns the tokenizer of a folder with these files, after a round trip through a checkpoint, and the notes."""
    (folder / "tokenizer.json").write_bytes(content or tokenizer_json(272))
    for name, values in {"config": {}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    tokenizer, notes = read_folder_tokenizer(folder, 280)
    again = deserialize(tokenizer.kind, tokenizer.serialize())
    assert again.serialize() == tokenizer.serialize()
    return again, notes


def ids(tokenizer):
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.ids.pad, tokenizer.ids.stop


def test_the_config_comes_first(tmp_path):
    tokenizer, notes = read(
        tmp_path,
        config={"bos_token_id": 1, "eos_token_id": 2},
        generation_config={"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
        tokenizer_config={"bos_token": START, "eos_token": "<|endoftext|>"},
    )
    assert ids(tokenizer) == (1, 2, 0, (2,))
    assert notes == (
        f"{tmp_path}: generation_config.json has bos 0, but config.json has 1, which is used",
        f"{tmp_path}: tokenizer_config.json has eos 0, but config.json has 2, which is used",
    )


@pytest.mark.parametrize("end", [END, {"content": END, "special": True}])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_names_where_no_file_has_ids(tmp_path, file, end):
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": -1}
    tokenizer, notes = read(tmp_path, config=config, **{file: {"bos_token": START, "eos_token": end}})
    assert (ids(tokenizer), notes) == ((1, 2, None, (2,)), ())


def test_generation_ends_as_transformers_ends_it(tmp_path):
    tokenizer, _ = read(tmp_path, config={"eos_token_id": [0, 7]}, generation_config={"eos_token_id": [5, 0, 6]})
    assert (tokenizer.eos_id, stop_ids(tokenizer)) == (0, [0, 2, 5, 6])  # 2 is the end of a turn


def test_guessed_names_are_the_last_resort_and_said(tmp_path):
    tokenizer, notes = read(tmp_path)
    assert ids(tokenizer) == (0, 0, None, (0,))
    assert notes == tuple(
        f"{tmp_path}: no file names the {kind} token; '<|endoftext|>' (0) is used" for kind in ("bos", "eos")
    )


def test_a_tokenizer_without_a_common_name_is_read_where_a_file_names_its_end(tmp_path):
    content = tokenizer_json(272).replace(b"<|endoftext|>", b"<|finished|>")
    assert ids(read(tmp_path, content, config={"eos_token_id": 0})[0]) == (0, 0, None, (0,))
    with pytest.raises(UserError, match=r"has none of the tokens .*; add one of them"):
        read(tmp_path, content)


@pytest.mark.parametrize("value", [272, -2, 2**40, True, "2", 1.5, [0, 999], {"a": 1}])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_ids_outside_the_vocabulary_are_one_line(tmp_path, file, value):
    with pytest.raises(
        UserError, match=rf"{file}.json: eos_token_id=.* is not a token of 0 to 271; correct it"
    ) as caught:
        read(tmp_path, **{file: {"eos_token_id": value}})
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_that_of_the_file_unless_the_ids_differ(tmp_path):
    alone = JsonTokenizer(tokenizer_json(272)).fingerprint
    assert read(tmp_path, config={"bos_token_id": 0, "eos_token_id": 0})[0].fingerprint == alone
    assert read(tmp_path, config={"bos_token_id": 0, "eos_token_id": 2})[0].fingerprint != alone


@pytest.mark.parametrize("template", ["{{ messages }}", [{"name": "default", "template": "{{ messages }}"}]])
def test_a_template_in_the_settings_goes_out_again(tmp_path, template):
    tokenizer, _ = read(tmp_path, tokenizer_config={"chat_template": template, "auto_map": {"AutoTokenizer": "x.Y"}})
    files = tokenizer_files(tokenizer, max_positions=64)
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["chat_template"] == template
    assert "auto_map" not in settings
    assert "chat_template.jinja" not in files
    assert files["tokenizer.json"] == tokenizer_json(272)


@pytest.mark.parametrize(
    ("template", "other"),
    [
        ("<start_of_turn>{{ messages }}", True),
        ([{"name": "default", "template": "[INST] {{ messages }}"}], True),
        (CHAT_TEMPLATE, False),
        ([{"name": "default", "template": CHAT_TEMPLATE}], False),
        (None, False),
    ],
)
def test_templates_that_are_not_chatml(tmp_path, template, other):
    added = {"1": {"content": START}}  # a token that the template does not use
    tokenizer, _ = read(tmp_path, tokenizer_config={"chat_template": template, "added_tokens_decoder": added})
    assert has_other_chat_template(tokenizer) is other
    if isinstance(template, str):
        (tmp_path / "chat_template.jinja").write_text(template)
        assert has_other_chat_template(read(tmp_path, tokenizer_config={})[0]) is other


def test_files_go_out_as_they_came(tmp_path):
    texts = {
        "chat_template.jinja": "{{ 1 }}",
        "LICENSE": "do\n",
        "USE_POLICY.md": "é",
        "additional_chat_templates/t.jinja": "t",
    }
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "NOTICE").write_bytes(b"\xff")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\nlicense: no\n")
    tokenizer, notes = read(tmp_path, config={"bos_token_id": 0, "eos_token_id": 0})
    files = tokenizer_files(tokenizer, max_positions=64)
    assert {name: files[name].decode() for name in texts} == texts
    assert tokenizer.files["README.md"] == "license: apache-2.0\n"
    assert notes == (f"{tmp_path}/NOTICE is not kept: it is not UTF-8 text of at most 1 MiB",)


def test_names_in_a_checkpoint_do_not_lead_out_of_the_folder(tmp_path):
    tokenizer, _ = read(tmp_path, config={"eos_token_id": 0})
    values = json.loads(tokenizer.serialize())
    values["files"] |= {"../LICENSE": "x", "/tmp/LICENSE": "x", "additional_chat_templates/../../x.jinja": "x"}
    hostile = deserialize(tokenizer.kind, json.dumps(values).encode())
    assert not [name for name in tokenizer_files(hostile, max_positions=64) if "/" in name]


def test_defaults_of_generate_go_out_again(tmp_path):
    defaults = {"temperature": 0.6, "top_p": 0.7, "do_sample": True, "eos_token_id": 2, "_from_model_config": True}
    tokenizer, _ = read(tmp_path, generation_config=defaults, config={"bos_token_id": 1, "pad_token_id": 279})
    assert _generation_config(tokenizer) == {
        "temperature": 0.6,
        "top_p": 0.7,
        "do_sample": True,
        "bos_token_id": 1,
        "eos_token_id": [2],
        "pad_token_id": 279,
    }


@pytest.mark.transformers
def test_the_mask_of_our_template_is_that_of_training(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    ours = JsonTokenizer(tokenizer_json(272))
    for name, content in tokenizer_files(ours, max_positions=512).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == CHAT_TEMPLATE.rstrip("\n") or theirs.chat_template == CHAT_TEMPLATE
    for content in ("the state", "", "\n\nthe é 🙂 ", " a\n"):
        chat = [Message("system", "x"), Message("user", content), Message("assistant", content)] * 2
        turns = [{"role": message.role, "content": message.content} for message in chat]
        made = theirs.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        example = tokens_and_mask(chat, ours)
        assert made["input_ids"] == example.tokens.tolist()
        assert made["assistant_masks"] == [int(target) for target in example.loss_mask.tolist()]


def test_a_folder_is_given_as_a_tokenizer(tmp_path):
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 275, "vocab_size": 280}
    ours, _ = read(tmp_path, config=config)
    warned = []
    given = load_tokenizer(str(tmp_path), warn=warned.append)
    assert (given.serialize(), given.fingerprint, warned) == (ours.serialize(), ours.fingerprint, [])
    assert given.fingerprint != load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint


def test_a_tokenizer_needs_no_model_beside_it(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(272))
    warned = []
    given = load_tokenizer(str(tmp_path), warn=warned.append)
    assert given.fingerprint == load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint
    assert warned == [
        f"{tmp_path}: no file names the {kind} token; '<|endoftext|>' (0) is used" for kind in ("bos", "eos")
    ]

"""A prepared corpus in a bucket: the same bytes, with random access."""

import json

import fsspec
import numpy as np
import pytest
from data_helpers import make_texts, write_jsonl
from gcs_emulator import make_read_only
from prepared_helpers import LENGTH, Silent, content, prepared

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.corpus import is_prepared, open_prepared, verify
from looplm_jax.data import open_corpus, train_batches
from looplm_jax.errors import UserError


def test_a_corpus_in_a_bucket(bucket, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    prepared(tokenizer, tmp_path / "here", path, unit_bytes=6000)
    out = f"{bucket}/prepared"
    assert not is_prepared(out)
    prepared(tokenizer, out, path, unit_bytes=6000)
    assert is_prepared(out)
    files = fsspec.filesystem("gs").find(f"{bucket}/prepared")
    wanted = content(tmp_path / "here")
    assert [name.partition("/prepared/")[2] for name in files] == sorted(wanted)
    assert all(fsspec.filesystem("gs").cat_file(name) == wanted[name.partition("/prepared/")[2]] for name in files)
    assert verify(open_prepared(out)) == []
    again = Silent()
    prepared(tokenizer, out, path, unit_bytes=6000, watcher=again)
    assert again.begun == []

    def batches(place):
        corpus = open_corpus(DataConfig(sources=(SourceConfig(path=str(place)),), validation_fraction=0.0))
        return train_batches(corpus, tokenizer, batch_size=4, sequence_length=LENGTH, seed=0)

    ours, theirs = batches(out), batches(tmp_path / "here")
    for _ in range(6):
        np.testing.assert_array_equal(next(ours).tokens, next(theirs).tokens)
    assert json.dumps(ours.state()["position"]) == json.dumps(theirs.state()["position"])
    ours.close()
    theirs.close()
    shard = open_prepared(out).manifest.train[0].name
    fsspec.filesystem("gs").rm(f"{out}/{shard}")
    prepared(tokenizer, out, path, unit_bytes=6000, watcher=again)
    assert again.units == 1
    assert verify(open_prepared(out)) == []


def test_a_bucket_that_refuses(gcs, bucket, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(9))
    make_read_only(gcs, bucket)
    with pytest.raises(
        UserError, match=rf"{bucket}/out/looplm_plan.json cannot be written \(.*; fix that and run the same"
    ):
        prepared(tokenizer, f"{bucket}/out", path)
    with pytest.raises(UserError, match=r"gs://nowhere-at-all/out.* cannot be (read|written)"):
        prepared(tokenizer, "gs://nowhere-at-all/out", path)

import re

from pipeline.data.catalog import CORPORA


def test_every_corpus_has_each_split_in_each_language():
    for corpus in CORPORA.values():
        expected = {f"{split}.{code}" for split in ("train", "valid", "test") for code in corpus.languages}
        assert set(corpus.files) == expected


def test_no_two_files_share_path_address_or_checksum():
    files = [file for corpus in CORPORA.values() for file in corpus.files.values()]
    for field in ("path", "url", "sha256"):
        assert len({getattr(file, field) for file in files}) == len(files)
    assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in files)


def test_a_mirror_holds_a_file_under_its_corpus_and_public_name():
    file = CORPORA["multi30k"].files["test.de"]
    assert file.path == "multi30k/test_2016_flickr.de.gz"
    assert file.url == (
        "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/test_2016_flickr.de.gz"
    )

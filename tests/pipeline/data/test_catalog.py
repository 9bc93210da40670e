import gzip
import hashlib
import os
import re
from pathlib import Path

import pytest

from pipeline.data.catalog import CORPORA

MIRROR = Path.cwd() / os.environ.get("CORPUS_MIRROR", "none")
FILES = [file for corpus in CORPORA.values() for file in corpus.files.values()]


def test_corpora_have_each_split_in_each_language():
    for corpus in CORPORA.values():
        expected = {f"{split}.{code}" for split in ("train", "valid", "test") for code in corpus.languages}
        assert set(corpus.files) == expected


def test_corpora_share_no_path_address_or_checksum():
    for field in ("path", "url", "sha256"):
        assert len({getattr(file, field) for file in FILES}) == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path)
def test_remote_files_are_gzip_by_https_under_their_public_name(file):
    assert re.fullmatch(r"https://[^?#]+\.gz", file.url)
    assert Path(file.path).name == Path(file.url).name
    assert re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.num_bytes > 10_000


def test_corpora_name_a_file_of_each_language_after_it():
    for corpus in CORPORA.values():
        for name, file in corpus.files.items():
            assert Path(file.url).suffixes[-2:] == [Path(name).suffix, ".gz"]


@pytest.mark.skipif(not MIRROR.is_dir(), reason="needs the corpora: set CORPUS_MIRROR to their folder")
@pytest.mark.parametrize("corpus", CORPORA)
def test_corpora_of_the_mirror_have_the_sizes_sums_and_equal_lines(corpus):
    lines = {}
    for name, file in CORPORA[corpus].files.items():
        packed = (MIRROR / file.path).read_bytes()
        assert (len(packed), hashlib.sha256(packed).hexdigest()) == (file.num_bytes, file.sha256), file.path
        lines.setdefault(name.partition(".")[0], set()).add(gzip.decompress(packed).count(b"\n"))
    assert all(len(numbers) == 1 for numbers in lines.values())

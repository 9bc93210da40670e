"""The public corpora that the download stage can get: the URL, size and checksum of each file."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A gzip-compressed text with one sentence per line."""

    path: str  # relative to data/downloads/ and to a mirror
    url: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A file for every split and language. Line i has the same sentence in all languages of a split."""

    licence: str
    languages: tuple[str, ...]
    files: dict[str, RemoteFile]  # "train.en" and so on


# Elliott et al. 2016 and 2017, task 1. Its test set is multi30k/2016 in SacreBLEU.
_MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
_MULTI30K_SPLITS = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
_MULTI30K_FILES = {
    "train.en": (568_929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    "train.de": (637_044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    "train.fr": (604_242, "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c"),
    "val.en": (21_650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    "val.de": (24_681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
    "val.fr": (23_001, "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9"),
    "test_2016_flickr.en": (21_077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
    "test_2016_flickr.de": (22_890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
    "test_2016_flickr.fr": (22_310, "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90"),
}


def _multi30k() -> Corpus:
    languages = ("en", "de", "fr")
    files = {}
    for split, name in _MULTI30K_SPLITS.items():
        for language in languages:
            num_bytes, sha256 = _MULTI30K_FILES[f"{name}.{language}"]
            file = f"{name}.{language}.gz"
            files[f"{split}.{language}"] = RemoteFile(
                path=f"multi30k/{file}", url=_MULTI30K_URL + file, num_bytes=num_bytes, sha256=sha256
            )
    return Corpus(licence="none stated; research use", languages=languages, files=files)


CORPORA = {"multi30k": _multi30k()}

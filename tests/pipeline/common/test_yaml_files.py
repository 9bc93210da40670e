import pytest
from dvc.utils.serialize import YAMLFileCorruptedError
from dvc.utils.serialize import parse_yaml as parse_by_dvc

from pipeline.common.yaml_files import parse_yaml, read_with_comments, read_yaml, write_yaml

READ_OTHERWISE_BY_YAML_1_1 = {
    "no": "no", "on": "on", "off": "off", "y": "y", "12:30": "12:30", "190:20:30": "190:20:30",
    "0400": 400, "010": 10, "0o17": 15, "1e-9": 1e-9, "1e3": 1000.0,
}  # fmt: skip


@pytest.mark.parametrize("text", READ_OTHERWISE_BY_YAML_1_1)
def test_parse_yaml_gives_the_values_that_dvc_reads(tmp_path, text):
    """Both read `no` as a text (Norwegian), not as false, and 0400 as four hundred, not as octal."""
    value = READ_OTHERWISE_BY_YAML_1_1[text]
    content = f"a: {text}\n{text}: a\n"
    assert parse_yaml(content) == parse_by_dvc(content, "params.yaml") == {"a": value, value: "a"}
    (tmp_path / "params.yaml").write_text(content)
    assert read_yaml(tmp_path / "params.yaml") == read_with_comments(tmp_path / "params.yaml")
    write_yaml(tmp_path / "params.yaml", {"a": value})
    assert parse_by_dvc((tmp_path / "params.yaml").read_text(), "params.yaml") == {"a": value}


@pytest.mark.parametrize("content", ["a: 1\na: 1\n", "s: {a: 1, b: 2, a: 3}\n", "- {a: 1, a: 2}\n"])
def test_parse_yaml_refuses_a_duplicate_key_as_dvc_does(tmp_path, content):
    (tmp_path / "params.yaml").write_text(content)
    for read in (read_yaml, read_with_comments):
        with pytest.raises(ValueError, match=r"params\.yaml is not valid YAML: .* found duplicate key"):
            read(tmp_path / "params.yaml")
    with pytest.raises(ValueError, match="found duplicate key"):
        parse_yaml(content)
    with pytest.raises(YAMLFileCorruptedError):
        parse_by_dvc(content, "params.yaml")

"""Names that cannot be paths are a sentence wherever a folder is named."""

import pytest

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded
from qwen_scope.index import FeatureIndex
from qwen_scope.index.harvest import harvest


@pytest.mark.parametrize("name", ["~nosuchuser/index", "null\0character", "x" * 5000])
def test_what_cannot_be_a_path(name, tmp_path):
    for use in (expanded, FeatureIndex.open, lambda path: harvest(tmp_path, path)):
        with pytest.raises(QwenScopeError, match="expected a path, found"):
            use(name)


def test_what_can(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/index") == tmp_path / "index"

"""`SparseFeatures`: the sparse pair and what can be done with it."""

import pytest
import torch
from safetensors.torch import save_file

from qwen_scope import QwenScopeError, SparseFeatures

INDICES = torch.tensor([[3, 0, 5], [1, 2, 3]])
VALUES = torch.tensor([[2.0, 1.0, -0.5], [4.0, 0.0, -1.0]])


@pytest.fixture
def features() -> SparseFeatures:
    return SparseFeatures(INDICES, VALUES, 6)


def test_what_it_is(features):
    assert features.k == 3
    assert features.shape == (2,)
    assert len(features) == 2
    assert features.active.tolist() == [[True, True, False], [True, False, False]]
    assert repr(features) == "SparseFeatures(2 positions, k=3, d_sae=6)"


def test_to_dense(features):
    assert features.to_dense().tolist() == [[1, 0, 0, 2, 0, -0.5], [0, 4, 0, -1, 0, 0]]
    batch = SparseFeatures(INDICES[None], VALUES[None], 6).to_dense()
    assert batch.shape == (1, 2, 6)
    assert torch.equal(batch[0], features.to_dense())


def test_activation_is_a_column_of_the_dense_form(features):
    dense = features.to_dense()
    for feature in range(6):
        assert torch.equal(features.activation(feature), dense[:, feature])
    for feature in (-1, 6):
        with pytest.raises(QwenScopeError, match=f"0 to 5, found {feature}"):
            features.activation(feature)


def test_top(features):
    assert features.top(1).indices.tolist() == [[3], [1]]
    assert features.top(2).values.tolist() == [[2, 1], [4, 0]]
    assert features.top(99).k == 3
    assert features.top(2).d_sae == 6
    for n in (0, -1):
        with pytest.raises(QwenScopeError, match=f"n = {n}"):
            features.top(n)


def test_indexing_is_that_of_the_positions(features):
    assert features[0].shape == ()
    assert features[0].indices.tolist() == [3, 0, 5]
    assert features[-1].activation(1) == 4
    assert repr(features[0]) == "SparseFeatures(one positions, k=3, d_sae=6)"
    assert features[1:].indices.tolist() == [[1, 2, 3]]
    assert features[torch.tensor([False, True])].values.tolist() == [[4, 0, -1]]
    assert features[[1, 0]].indices.tolist() == [[1, 2, 3], [3, 0, 5]]
    batch = SparseFeatures(INDICES[None], VALUES[None], 6)
    assert batch[0, 1].indices.tolist() == [1, 2, 3]
    assert [len(row) for row in batch] == [2]


@pytest.mark.usefixtures("unchecked")
def test_shapes_must_agree():
    with pytest.raises(QwenScopeError, match=r"\(2, 3\) and \(2, 2\)"):
        SparseFeatures(INDICES, VALUES[:, :2], 6)


def test_save_and_load(features, tmp_path):
    path = tmp_path / "new" / "features.safetensors"
    features.save(path)
    back = SparseFeatures.load(str(path))
    assert torch.equal(back.indices, INDICES)
    assert back.indices.dtype == torch.long
    assert torch.equal(back.values, VALUES)
    assert back.d_sae == 6
    assert [p.name for p in path.parent.iterdir()] == ["features.safetensors"], "something is left beside the file"


def test_part_of_the_positions_saves_only_that_part(features, tmp_path):
    features[:, None][0].save(tmp_path / "part")
    assert SparseFeatures.load(tmp_path / "part").indices.tolist() == [[3, 0, 5]]


def test_loading_something_else(features, tmp_path):
    with pytest.raises(QwenScopeError, match="found none"):
        SparseFeatures.load(tmp_path / "missing")
    save_file({"indices": INDICES, "values": VALUES}, tmp_path / "other")
    with pytest.raises(QwenScopeError, match="another file"):
        SparseFeatures.load(tmp_path / "other")
    features.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-3])
    with pytest.raises(QwenScopeError, match="do not parse"):
        SparseFeatures.load(tmp_path / "cut")


def test_to_another_device(features):
    moved = features.to("meta")
    assert moved.indices.device.type == moved.values.device.type == "meta"
    assert moved.d_sae == 6
    assert features.to(torch.device("cpu")).values.device.type == "cpu"


def test_it_cannot_be_changed(features):
    with pytest.raises(AttributeError):
        features.d_sae = 7

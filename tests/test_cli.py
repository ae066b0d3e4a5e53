"""The command as a person types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_scope import Suite, TopKSAE
from qwen_scope.bundled import GGUF_SHA256, MODEL_NAME
from qwen_scope.cli import main


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qwen_scope.cli", *arguments], input=stdin, capture_output=True, text=True, check=False
    )


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The command in this process: its standard output."""
    main(arguments)
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The command in this process, which must fail with status 1 and one line: that line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("qwen-scope: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def small_suite(tmp_path: Path) -> Path:
    """A random SAE for the bundled model's width."""
    rng = torch.Generator().manual_seed(0)
    sae = TopKSAE(
        torch.randn(128, 576, generator=rng),
        torch.randn(576, 128, generator=rng),
        torch.zeros(128),
        torch.zeros(576),
        k=4,
    )
    suite = Suite.of({3: sae}, "small", MODEL_NAME, {"model_file_sha256": GGUF_SHA256})
    suite.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("command", [[], ["features"], ["check"], ["suites"], ["convert"], ["demo"]])
def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str], command: list[str]):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: qwen-scope" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom qwen_scope.cli import main\n"
        "try:\n    main(['features', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.real
def test_features_as_json(capsys: pytest.CaptureFixture[str]):
    out = json.loads(call(capsys, "features", "The capital of France is", "--layer", "15", "--top", "5", "--json"))
    (text,) = out["texts"]
    assert [token["token"] for token in text["tokens"]] == ["The", " capital", " of", " France", " is"]
    for token in text["tokens"]:
        assert list(token["features"]) == ["15"]
        values = [feature["value"] for feature in token["features"]["15"]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert all(feature["feature"].startswith("15/") for feature in token["features"]["15"])
        start, end = token["span"]
        assert text["text"][start:end] == token["token"]


@pytest.mark.real
def test_features_as_a_table_of_several_texts(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "texts.txt").write_text("one text\n\nanother text\n")
    out = call(capsys, "features", "--file", str(tmp_path / "texts.txt"), "--layers", "7", "15", "--top", "2")
    assert out.index("'one text'") < out.index("'another text'")
    assert out.count("layer 7:") == out.count("layer 15:") == 2


@pytest.mark.real
def test_features_of_a_chat_and_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("hello\n"))
    out = json.loads(call(capsys, "features", "--file", "-", "--chat", "--layer", "15", "--json"))
    assert out["texts"][0]["text"].startswith("<|im_start|>")


@pytest.mark.real
def test_features_can_be_saved(capsys: pytest.CaptureFixture[str], tmp_path: Path, small_suite: Path):
    from qwen_scope import TextFeatures

    call(capsys, "features", "some text", "--suite", str(small_suite), "--save", str(tmp_path / "found.safetensors"))
    assert TextFeatures.load(tmp_path / "found.safetensors")[3].k == 4


@pytest.mark.real
def test_check_fails_on_saes_that_do_not_fit(capsys: pytest.CaptureFixture[str], small_suite: Path):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--suite", str(small_suite), "--json"])
    assert stopped.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["layers"][0]["fidelity"]["fvu"] > 1
    assert "another model" in report["layers"][0]["mistakes"][0]


def test_suites_lists_the_published_and_the_bundled(capsys: pytest.CaptureFixture[str]):
    listed = json.loads(call(capsys, "suites", "--json"))
    assert len(listed["published"]) == 14
    by_name = {row["name"]: row for row in listed["published"]}
    assert by_name["qwen3.5-27b-k100"]["bytes_per_layer"] == pytest.approx(3.36e9, rel=0.01)
    assert listed["bundled"]["k"] == 50
    table = call(capsys, "suites")
    assert "Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_50" in table
    assert "bundled" in table


def test_convert_there_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path, small_suite: Path):
    call(capsys, "convert", str(small_suite), str(tmp_path / "published"), "--format", "published")
    assert (tmp_path / "published" / "layer3.sae.pt").is_file()
    call(capsys, "convert", str(tmp_path / "published"), str(tmp_path / "back"))
    assert torch.equal(Suite.from_pretrained(tmp_path / "back")[3].W_enc, Suite.from_pretrained(small_suite)[3].W_enc)


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path, small_suite: Path):
    assert "expected a text" in fail(capsys, "features")
    assert "qwen3.5-2b-k50" in fail(capsys, "features", "x", "--suite", "qwen3.5-2b-k5O")
    assert "layer" in fail(capsys, "features", "x", "--suite", str(small_suite), "--layer", "99")
    assert "--top" in fail(capsys, "features", "x", "--top", "0")
    assert "lines of text" in fail(capsys, "check", "--file", os.devnull)
    assert "UTF-8" in fail(capsys, "features", "--file", str(tmp_path / "missing.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in fail(capsys, "features", "--file", str(tmp_path / "binary"))
    assert "both" in fail(capsys, "features", "x", "--file", "y")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "layer0.sae.pt").write_bytes(b"PK\x03\x04 cut short")
    assert "layer0.sae.pt" in fail(capsys, "convert", str(tmp_path / "cut"), str(tmp_path / "out"), "--k", "4")


def test_bad_input_shows_no_traceback_in_a_real_process():
    done = run("features", "x", "--suite", "no-such-suite")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.real
def test_demo_ends_with_what_to_try_next(capsys: pytest.CaptureFixture[str]):
    out = call(capsys, "demo")
    assert "' capital'" in out
    assert out.count("15/") > 20
    assert out.index("Next:") > out.index("15/")

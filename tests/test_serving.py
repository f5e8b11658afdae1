"""What a run leaves is served by `transformers serve` as it is."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")


def asked(port: int, path: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Content-Type": "application/json"})
    request.data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture
def server(decoder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(decoder), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log)
        try:
            yield port, process, tmp_path / "log"
        finally:
            process.terminate()
            process.wait(30)


def test_a_folder_is_served_and_answers_as_it_does_here(server, decoder):
    port, process, log = server
    answer, deadline = None, time.monotonic() + 90
    while answer is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        try:
            body = {"model": str(decoder), "prompt": "the film was", "max_tokens": 8, "temperature": 0}
            answer = asked(port, "/v1/completions", body)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(decoder), AutoTokenizer.from_pretrained(decoder)
    ids = tokenizer("the film was", return_tensors="pt")
    here = network.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(here, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]


@pytest.mark.slow
def test_the_notebook_goes_from_text_to_a_served_model(corpus, tmp_path, monkeypatch, capsys):
    """Its cells as they are, on little text and in few steps."""
    pytest.importorskip("onnxruntime")
    root = Path(__file__).parents[1]
    cells = json.loads((root / "docs" / "from_text_to_a_served_model.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    monkeypatch.setenv("PYTHONPATH", str(root))
    toy = f" --data.path {corpus} --data.seq_len 32 --data.batch_size 4 --trainer.max_steps 4 --trainer.max_time null "
    toy += "--trainer.val_check_interval 4 --model.architecture.num_hidden_layers 1"
    small = {"recipes/pretrain.py": toy, "recipes/compress.py": f" --data.path {corpus} --rows 2"}
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"]).replace("8765", str(free_port()) if "port" not in names else names["port"])
        if "port" not in names and "--port" in source:
            names["port"] = source.partition('"--port", "')[2].partition('"')[0]
        exec(compile(source, "cell", "exec"), names)  # which is how a notebook runs them
        if "recipe" in names and "plain" not in names:
            names["plain"] = names["recipe"]
            names["recipe"] = lambda line: names["plain"](line + small.get(line.split()[0], ""))
    assert (tmp_path / "runs" / "notebook" / "onnx" / "model.onnx").is_file()
    assert names["summary"]["steps"] == 4 and "def " in capsys.readouterr().out


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

"""Rewards: a model, Python functions and a real server, on rows that a real policy wrote."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Workers, make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.crews import worker_arguments
from rlhf_ray.functions import load_function
from rlhf_ray.models.hf_weights import load_reward_model, save_reward_model
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.rewards import http as http_reward
from rlhf_ray.tokenizer import Tokenizer, train_bpe, write_hf_tokenizer
from rlhf_ray.types import Rollout
from rlhf_ray.workers.reward import RewardWorker

FUNCTIONS = """
calls = []

def length(response, **row):
    return len(response)

def number(number, **row):
    return number

def seen(prompt, response, messages, number):
    assert messages == [{"role": "user", "content": prompt}]
    assert prompt.endswith(f" {number}")
    return number if isinstance(response, str) else -1

def nan_at_four(number, **row):
    return float("nan") if number == 4 else 0.5

def nothing(**row):
    return None

def fails(number, **row):
    raise RuntimeError(f"no opinion on {number}")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    make_world(folder)
    (folder / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rollout(world: Path) -> Rollout:
    return Workers.build(ppo_config(world)).generate()


def scorer(world: Path, *sources: dict[str, Any]) -> RewardWorker:
    config = ppo_config(world, rewards=list(sources))
    return RewardWorker(**worker_arguments(config, read_inputs(config))[RewardWorker])


def function(world: Path, name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"kind": "function", "source": f"{world / 'functions.py'}:{name}", "weight": weight}


def numbers(rollout: Rollout) -> torch.Tensor:
    return rollout.prompt_ids.float()  # prompt i of the file has the field number = i


# ---- functions


def test_a_function_gets_prompt_response_messages_and_fields(world: Path, rollout: Rollout) -> None:
    assert torch.equal(scorer(world, function(world, "seen")).score(rollout), numbers(rollout))


def test_a_response_is_the_text_without_special_tokens(world: Path, rollout: Rollout) -> None:
    tokenizer = Tokenizer.load(world / "policy")
    texts = [tokenizer.decode(t[m].tolist()) for t, m in zip(rollout.tokens, rollout.response_mask, strict=True)]
    assert not any("<|" in text for text in texts)
    assert scorer(world, function(world, "length")).score(rollout).tolist() == [float(len(text)) for text in texts]


def test_several_rewards_are_added_with_their_weights(world: Path, rollout: Rollout) -> None:
    model = {"kind": "model", "source": str(world / "reward"), "weight": -2.0}
    both = scorer(world, function(world, "number", 0.5), model).score(rollout)
    expected = 0.5 * numbers(rollout) - 2.0 * scorer(world, {**model, "weight": 1.0}).score(rollout)
    torch.testing.assert_close(both, expected)
    assert both.dtype == torch.float32


def test_the_first_answer_without_a_finite_score_is_said(
    world: Path, rollout: Rollout, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = (rollout.prompt_ids == 4).nonzero().flatten().tolist()
    row = bad[0]
    answer = Tokenizer.load(world / "policy").decode(rollout.tokens[row][rollout.response_mask[row]].tolist())
    worker = scorer(world, function(world, "length"), function(world, "nan_at_four"))
    for _ in range(2):
        assert worker.score(rollout).isnan().nonzero().flatten().tolist() == bad
    said = capsys.readouterr().out
    assert said.count("returned nan") == 1 and f"nan_at_four returned nan for the answer {answer!r}; nothing" in said


def test_a_score_that_is_no_number_is_refused(world: Path, rollout: Rollout) -> None:
    with pytest.raises(ValueError, match=r"functions.py:nothing returned None; it must return a number"):
        scorer(world, function(world, "nothing")).score(rollout)


def test_what_a_function_raises_passes(world: Path, rollout: Rollout) -> None:
    with pytest.raises(RuntimeError, match="no opinion on"):
        scorer(world, function(world, "fails")).score(rollout)


def test_the_rows_own_response_gives_way_to_the_policys(world: Path) -> None:
    rows = '{"prompt": "a dog", "response": "gold", "answer": 7}\n'
    (world / "gold.jsonl").write_text(rows, encoding="utf-8")
    source = world / "gold.py"
    source.write_text("def f(prompt, response, answer, **row):\n    return answer + 10 * (response == 'gold')\n")
    config = ppo_config(world, prompts=world / "gold.jsonl", reward=[f"{source}:f"], batch_size=6)
    workers = Workers.build(config)
    assert workers.reward.score(workers.generate()).tolist() == [7.0] * 6


@pytest.mark.parametrize(
    ("source", "message"),
    [("functions.py:absent", "has no function absent"), ("missing.py:f", "there is no file"), ("f.py:", "not of the")],
)
def test_a_function_that_is_not_there_is_refused_before_any_worker(world: Path, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward = .*{message}"):
        read_inputs(ppo_config(world, reward=[str(world / source)]))


def test_no_reward_at_all_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="rewards is empty: give --reward"):
        read_inputs(ppo_config(world, rewards=[]))


# ---- a model


def test_a_models_score_is_its_own_forward_normalised(world: Path, rollout: Rollout, tmp_path: Path) -> None:
    model = load_reward_model(world / "reward")
    with torch.inference_mode():
        plain = model(rollout.tokens, rollout.attention_mask)
    scores = scorer(world, {"kind": "model", "source": str(world / "reward")}).score(rollout)
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=0)
    model.set_normaliser(mean=0.25, std=2.0)
    tokenizer = Tokenizer.load(world / "reward")
    special = {name: getattr(tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    save_reward_model(model, tmp_path / "normalised", **special)
    write_hf_tokenizer(tmp_path / "normalised", tokenizer, "chat")
    normalised = scorer(world, {"kind": "model", "source": str(tmp_path / "normalised")}).score(rollout)
    torch.testing.assert_close(normalised, (plain - 0.25) / 2.0, atol=1e-5, rtol=0)


def test_a_model_with_another_vocabulary_is_refused(world: Path, tmp_path: Path) -> None:
    model = load_reward_model(world / "reward")
    other = train_bpe(["something else entirely, with other merges"] * 3, 280)
    save_reward_model(model, tmp_path, pad_id=other.pad_id, bos_id=other.bos_id, eos_id=other.eos_id)
    write_hf_tokenizer(tmp_path, other, "chat")
    with pytest.raises(ValueError, match=r"rewards.source = .* has another vocabulary than the policy"):
        read_inputs(ppo_config(world, reward=[str(tmp_path)]))


# ---- a server

Answer = Callable[[dict[str, Any], int], tuple[int, bytes]]


class Server(ThreadingHTTPServer):
    """Answers the nth request with ``answer(body, n)``."""

    daemon_threads = True
    answer: Answer

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has given up is not an error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    """One POST of JSON."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {"type": self.headers["Content-Type"], "user": self.headers["Authorization"]}
        self.server.requests.append({"path": self.path, **headers, **body})
        code, answer = self.server.answer(body, len(self.server.requests))
        self.send_response(code)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_reward, "FIRST_PAUSE", 0.001)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def scores_of(body: dict[str, Any]) -> bytes:
    return json.dumps({"scores": [row["number"] / 4 for row in body["rows"]]}).encode()


def served(world: Path, server: Server, **changes: Any) -> RewardWorker:
    return scorer(world, {"kind": "http", "source": server.url, **changes})


def test_a_server_gets_the_rows_and_gives_the_scores(world: Path, rollout: Rollout, server: Server) -> None:
    server.answer = lambda body, n: (200, scores_of(body))
    assert torch.equal(served(world, server).score(rollout), numbers(rollout) / 4)
    (request,) = server.requests
    assert request["path"] == "/score" and request["type"] == "application/json"
    row = request["rows"][0]
    assert row["prompt"].endswith(f" {row['number']}")
    assert row["messages"] == [{"role": "user", "content": row["prompt"]}]
    assert sorted(row) == ["messages", "number", "prompt", "response"]


def test_a_password_reaches_the_server_and_nothing_that_is_written(
    world: Path, rollout: Rollout, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url.replace("://", "://me:hunter2@") + "?token=hunter3"
    server.answer = lambda body, n: (200, scores_of(body))
    config = ppo_config(world, checkpoints=tmp_path, total_steps=1, rewards=[], reward=[url])
    folder = app.train_ppo(config)
    (request, *_) = server.requests
    assert request["path"] == "/score?token=hunter3"
    assert request["user"] == "Basic " + base64.b64encode(b"me:hunter2").decode()
    app.train_ppo(config)  # resumes: what is compared has no secrets either
    server.answer = lambda body, n: (404, b"")
    with pytest.raises(ValueError, match=r"reward http://\*\*\*@127.0.0.1:\d+/score\?token=\*\*\* answered 404"):
        served(world, server, source=url).score(rollout)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert b"token=***" in (folder / "config.yaml").read_bytes()
    assert not any(b"hunter" in text for text in [*written, capsys.readouterr().out.encode()])


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(world: Path, rollout: Rollout, server: Server, code: int) -> None:
    server.answer = lambda body, n: (code, b"") if n <= 2 else (200, scores_of(body))
    assert torch.equal(served(world, server, retries=2).score(rollout), numbers(rollout) / 4)
    assert len(server.requests) == 3


def test_a_server_that_stays_busy_is_given_up(world: Path, rollout: Rollout, server: Server) -> None:
    server.answer = lambda body, n: (503, b"")
    with pytest.raises(ValueError, match=r"did not answer in 3 attempts: HTTP Error 503"):
        served(world, server, retries=2).score(rollout)
    assert len(server.requests) == 3


@pytest.mark.parametrize("code", [400, 404])
def test_a_refusal_is_not_asked_again(world: Path, rollout: Rollout, server: Server, code: int) -> None:
    server.answer = lambda body, n: (code, b"")
    with pytest.raises(ValueError, match=rf"/score answered {code} "):
        served(world, server).score(rollout)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer", [b"no JSON", b"\xff\xfe", b'{"score": [1]}', b'{"scores": 1}', b'{"scores": [null]}', b"[1, 2]"]
)
def test_an_answer_that_is_no_list_of_scores_is_shown(
    world: Path, rollout: Rollout, server: Server, answer: bytes
) -> None:
    server.answer = lambda body, n: (200, answer)
    with pytest.raises(ValueError, match=r'must answer \{"scores": \[number, ...\]\}; it answered b'):
        served(world, server).score(rollout)


def test_too_few_scores_are_refused_and_nan_is_passed_on(world: Path, rollout: Rollout, server: Server) -> None:
    server.answer = lambda body, n: (200, b'{"scores": [1, 2]}')
    with pytest.raises(ValueError, match=r"returned \(2,\) scores for 12 rows"):
        served(world, server).score(rollout)
    server.answer = lambda body, n: (200, json.dumps({"scores": [0] * 11 + [float("nan")]}).encode())
    assert served(world, server).score(rollout).isnan().tolist() == [False] * 11 + [True]


def test_a_server_that_is_too_slow_is_given_up(world: Path, rollout: Rollout, server: Server) -> None:
    given_up = threading.Event()

    def answer(body: dict[str, Any], n: int) -> tuple[int, bytes]:
        given_up.wait(60)
        return 200, scores_of(body)

    server.answer = answer
    with pytest.raises(ValueError, match=r"did not answer in 2 attempts: timed out"):
        served(world, server, retries=1, timeout=0.05).score(rollout)
    given_up.set()


def test_a_server_that_speaks_no_http_is_given_up(world: Path, rollout: Rollout) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b"what?\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=babble, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/score"
        with pytest.raises(ValueError, match="did not answer in 1 attempts"):
            scorer(world, {"kind": "http", "source": url, "retries": 0}).score(rollout)
        thread.join(timeout=5)


def test_nobody_at_the_address_is_one_line(world: Path, rollout: Rollout) -> None:
    source = {"kind": "http", "source": "http://127.0.0.1:9/score", "retries": 0}
    with pytest.raises(ValueError, match=r"did not answer in 1 attempts: .*refused"):
        scorer(world, source).score(rollout)


def test_a_file_that_was_rewritten_is_run_anew_whatever_its_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    for value in (1, 2):
        file.write_text(f"def score(): return {value}\n", encoding="utf-8")
        os.utime(file, (1e9, 1e9))
        assert load_function(f"{file}:score")() == value

"""Talking to checkpoints through pipes and at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_folders import make_policy, small_tokenizer

from rlhf_ray.chat.conversation import Conversation
from rlhf_ray.chat.display import Display, printable
from rlhf_ray.chat.speaker import Speaker
from rlhf_ray.chat.terminal import Terminal, chat
from rlhf_ray.config import ChatConfig
from rlhf_ray.generation import Sampling, row_uniforms
from rlhf_ray.generation.load import find_device, load_policy_with_tokenizer, recorded_template
from rlhf_ray.tokenizer import write_hf_tokenizer
from rlhf_ray.types import Message

LENGTH = 12


def speaker(folder: Path, *, template: str | None = None) -> Speaker:
    return Speaker.load(folder, template=template, device=torch.device("cpu"), field="policy")


def terminal(folders: list[Path], *, interactive: bool = False, **fields: object) -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    config = ChatConfig(**{"max_new_tokens": LENGTH, **fields})
    return Terminal([speaker(f) for f in folders], config, Display(interactive=interactive, out=out)), out


def expected(folder: Path, conversation: Conversation, turn: int, **sampling: float) -> str:
    """What a checkpoint answers, generated without any streaming."""
    policy = speaker(folder)
    settings = Sampling(max_new_tokens=LENGTH, **{"temperature": 0.7, "top_p": 0.95, **sampling})
    prompt = policy.template.prompt_ids(policy.tokenizer, conversation.messages)
    uniforms = row_uniforms(0, turn, 0, LENGTH)
    ids = policy.engine.generate([prompt], uniforms[None], settings)[0].tokens
    special = [i for i, token in enumerate(ids) if token >= policy.tokenizer.base_size]
    return policy.tokenizer.decode(ids[: special[0]] if special else ids)


def test_turns_are_answered_and_remembered(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "a")
    session, out = terminal([folder], system="S")
    session.run(iter(["hello", "", "and you?"]))
    first = Conversation(system="S").asked("hello")
    answer = expected(folder, first, 0)
    second = first.answered(answer).asked("and you?")
    again = expected(folder, second, 1)
    assert answer and again
    assert session.conversations == [second.answered(again)]
    assert out.getvalue() == printable(answer) + "\n" + printable(again) + "\n"


def test_the_answer_ends_at_eos(tmp_path: Path) -> None:
    policy = speaker(make_policy(tmp_path / "a"))
    prompt = Conversation().asked("hello").prompt(policy.tokenizer, policy.template, 40)
    settings = Sampling(max_new_tokens=20)
    whole = [x for seed in range(40) for x in [list(policy.engine.stream(prompt.token_ids, uniforms(seed), settings))]]
    ended = [(seed, ids) for seed, ids in enumerate(whole) if policy.tokenizer.eos_id in ids[1:]]
    assert ended, "no sample ends by EOS: choose another random model"
    seed, ids = ended[0]
    text = "".join(policy.answer(prompt, settings, uniforms(seed)))
    before = ids[: next(i for i, token in enumerate(ids) if token >= policy.tokenizer.base_size)]
    assert text == policy.tokenizer.decode(before)
    assert "<|eos|>" not in text


def uniforms(seed: int) -> np.ndarray:
    return row_uniforms(seed, 0, 0, 20)


def test_commands(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "a")
    session, _ = terminal([folder])
    saved = tmp_path / "talk.json"
    session.run(iter(["/system be brief", "/temperature 0", "hello", f"/save {saved}", "/reset"]))
    answer = expected(folder, Conversation(system="be brief").asked("hello"), 0, temperature=0.0)
    assert session.conversations == [Conversation(system="be brief")]
    session.run(iter([f"/load {saved}", "/system", "/quit", "never read"]))
    assert session.conversations == [Conversation().asked("hello").answered(answer)]
    assert session.sampling.temperature == 0


def test_a_message_may_begin_with_a_slash(tmp_path: Path) -> None:
    session, _ = terminal([make_policy(tmp_path / "a")])
    session.handle("//etc")
    assert session.conversations[0].turns[0] == Message(role="user", content="/etc")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 1", "unknown command /temprature; the nearest one is /temperature"),
        ("/xyzzy", "unknown command /xyzzy; see /help"),
        ("/temperature hot", "temperature is 'hot'"),
        ("/temperature -1", r"temperature is -1\.0"),
        ("/save", "/save needs a file's name"),
        ("/load nowhere.json", "nowhere.json: no such file"),
        ("/save /nowhere/at/all.json", "No such file"),
    ],
)
def test_wrong_commands(tmp_path: Path, line: str, message: str) -> None:
    folder = make_policy(tmp_path / "a")
    piped, _ = terminal([folder])
    with pytest.raises(ValueError, match=message):
        piped.run(iter([line]))
    shown, out = terminal([folder], interactive=True)
    shown.run(iter([line, "hello"]))
    assert out.getvalue().startswith("error: ")
    assert len(shown.conversations[0].turns) == 2


def test_two_checkpoints_side_by_side(tmp_path: Path) -> None:
    folders = [make_policy(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 5))]
    session, out = terminal(folders)
    session.run(iter(["hello"]))
    asked = Conversation().asked("hello")
    answers = [expected(folder, asked, 0) for folder in folders]
    assert answers[0] != answers[1]
    assert [c.turns[1].content for c in session.conversations] == answers
    blocks = "".join(f"[{f}]\n{printable(a)}\n" for f, a in zip(folders, answers, strict=True))
    assert out.getvalue() == blocks
    session.handle(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk-2.json").read_text())["messages"][1]["content"] == answers[1]


def test_columns_hold_both_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    display = Display(interactive=True, out=out)
    said: list[list[str]] = [[], []]
    display.side_by_side(["left", "right"], [iter(["a", "b", "c"]), iter(["x[red]"])], said)
    assert said == [["a", "b", "c"], ["x[red]"]]
    row = next(line for line in out.getvalue().splitlines() if "abc" in line)
    assert "x[red]" in row


def test_stopping_an_answer_keeps_what_was_said(tmp_path: Path) -> None:
    session, out = terminal([make_policy(tmp_path / "a")], interactive=True)

    def interrupted(pieces: list[str]) -> Iterator[str]:
        yield from pieces
        raise KeyboardInterrupt

    stream = session.display.stream
    session.display.stream = lambda _, said: stream(interrupted(["so", " far"]), said)  # type: ignore[method-assign]
    session.run(iter(["hello"]))
    assert session.conversations == [Conversation().asked("hello").answered("so far")]
    session.display.stream = lambda _, said: stream(interrupted([]), said)  # type: ignore[method-assign]
    session.run(iter(["more"]))
    assert len(session.conversations[0].turns) == 2
    assert "stopped" in out.getvalue()


def test_notice_when_the_context_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = terminal([make_policy(tmp_path / "a")])
    session.run(iter(["What is the capital of the valley?"] * 6))
    assert "context full: the model no longer sees the" in capsys.readouterr().err
    assert len(session.conversations[0].turns) == 12


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\x07\tc\nd\x9b") == "a\ufffd[31mb\ufffd\ufffd\tc\nd\ufffd"


def test_the_recorded_template_is_used_unless_another_is_named(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "a", template="alpaca")
    assert recorded_template(folder) == "alpaca"
    assert speaker(folder).template.name == "alpaca"
    assert speaker(folder, template="plain").template.name == "plain"
    (folder / "tokenizer_config.json").unlink()
    assert speaker(folder).template.name == "chat"


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "a")
    write_hf_tokenizer(folder, small_tokenizer(270), "chat")
    with pytest.raises(ValueError, match=r"policy = .*the model has 287 tokens.*has 277") as error:
        load_policy_with_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_missing_checkpoint_and_a_lonely_comparison_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy = .*no model there"):
        chat(ChatConfig(policy=tmp_path))
    with pytest.raises(ValueError, match="name two checkpoints"):
        chat(ChatConfig(compare=[tmp_path]))


def test_no_room_for_a_prompt_is_refused_at_once(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "a")
    with pytest.raises(ValueError, match=r"max_new_tokens = 64 leaves no room .* context of 64 tokens"):
        chat(ChatConfig(policy=folder, max_new_tokens=64))
    with pytest.raises(ValueError, match="system turn and template take"):
        chat(ChatConfig(policy=folder, max_new_tokens=40, system="x" * 90))


def test_an_absent_device_is_refused() -> None:
    if torch.cuda.is_available():
        assert find_device("auto").type == "cuda"
    else:
        assert find_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="device = cuda"):
            find_device("cuda")


def command(repository: Path, folder: Path, *flags: str) -> list[str]:
    script = str(repository / "launch" / "chat.py")
    return [sys.executable, script, "--policy", str(folder), "--device", "cpu", *flags]


def test_piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_policy(tmp_path / "a")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/reset\nhello\n"))
    chat(ChatConfig(policy=folder, max_new_tokens=LENGTH, device="cpu"))
    asked = Conversation().asked("hello")
    answers = [expected(folder, asked, turn) for turn in (0, 1)]
    shown = capsys.readouterr()
    assert shown.out == "".join(printable(answer) + "\n" for answer in answers)
    assert shown.err == ""


class Screen:
    """What a pseudo-terminal shows."""

    def __init__(self, controller: int) -> None:
        self.controller, self.text, self.read = controller, "", 0

    def more(self) -> None:
        """Wait for further output; fails after a minute of silence."""
        assert select.select([self.controller], [], [], 60)[0], f"silent after {self.text!r}"
        self.text += os.read(self.controller, 4096).decode(errors="replace")

    def expect(self, wanted: str) -> None:
        """Wait until ``wanted`` is shown behind what was expected before."""
        while (at := self.text.find(wanted, self.read)) < 0:
            self.more()
        self.read = at + len(wanted)


def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(repository: Path, tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "a", n_positions=40_000, endless=True)
    controller, terminal_side = pty.openpty()
    process = subprocess.Popen(
        command(repository, folder, "--max-new-tokens", "30000"),
        stdin=terminal_side,
        stdout=terminal_side,
        stderr=terminal_side,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(terminal_side)
    screen = Screen(controller)
    try:
        screen.expect("> ")
        os.write(controller, b"hello\n")
        screen.expect("hello\r\n")
        while len(screen.text) < screen.read + 5:
            screen.more()
        process.send_signal(signal.SIGINT)
        screen.expect("stopped")
        screen.expect("> ")
        os.write(controller, b"/nonsense\n")
        screen.expect("error: unknown command /nonsense")
        screen.expect("> ")
        os.write(controller, b"\x04")
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)

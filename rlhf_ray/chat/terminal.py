"""A conversation at the prompt: streams answers, remembers turns, obeys commands.

On a terminal, Ctrl-C stops an answer and Ctrl-D ends the conversation.  When standard input or output is
piped, every line is a message and only answers are written to standard output; notices go to standard error,
and what is refused ends the program.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlhf_ray.chat.conversation import Conversation
from rlhf_ray.chat.display import Display
from rlhf_ray.chat.interrupt import Interrupt
from rlhf_ray.chat.speaker import Speaker
from rlhf_ray.config import ChatConfig
from rlhf_ray.generation import Sampling, row_uniforms
from rlhf_ray.generation.load import find_device

HELP = """\
/system TEXT    set the system turn, which is never forgotten; without TEXT, remove it
/reset          forget every turn but the system turn
/save FILE      save the conversation as JSON
/load FILE      go on with a saved conversation
/temperature X  0 takes the likeliest token; without X, show the present value
/help           show this
/quit           end (so does Ctrl-D)
A message that begins with a slash is written with two."""
PROMPT = "> "


class Terminal:
    """Reads lines and answers them, with one checkpoint or with several side by side."""

    def __init__(self, speakers: Sequence[Speaker], config: ChatConfig, display: Display) -> None:
        self.speakers = speakers
        self.display = display
        self.seed = config.seed
        self.sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        self.conversations = [Conversation(system=config.system) for _ in speakers]
        self.answered = 0
        self._noticed = ""
        self.commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/temperature": self._temperature,
            "/help": lambda _: self.display.notice(HELP),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answer lines until they end or one says /quit.

        Raises ValueError for a wrong command when piped; on a terminal it is shown and the talk goes on.
        """
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                self.handle(line)
            except (ValueError, OSError) as error:
                if not self.display.interactive:
                    raise ValueError(str(error)) from error
                self.display.notice(f"error: {error}")
            except KeyboardInterrupt:
                if not self.display.interactive:
                    raise
                self.display.notice("stopped")

    def handle(self, line: str) -> None:
        """Obey a command or answer a message; blank lines are ignored.  ValueError for a wrong command."""
        if not line.strip():
            return
        if line.startswith("//"):
            self.answer(line[1:])
        elif line.startswith("/"):
            name, _, rest = line.strip().partition(" ")
            if name not in self.commands:
                near = difflib.get_close_matches(name, [*self.commands, "/quit"], n=1)
                hint = f"the nearest one is {near[0]}" if near else "see /help"
                raise ValueError(f"unknown command {name}; {hint}")
            self.commands[name](rest.strip())
        else:
            self.answer(line)

    def answer(self, message: str) -> None:
        """Answer a message with every speaker and remember both, the answer as far as it came.

        A message without any answer is forgotten.
        """
        asked = [conversation.asked(message) for conversation in self.conversations]
        prompts = [
            speaker.prompt(conversation, self.sampling.max_new_tokens)
            for speaker, conversation in zip(self.speakers, asked, strict=True)
        ]
        self._notice_once(next((prompt.notice for prompt in prompts if prompt.notice), ""))
        uniforms = row_uniforms(self.seed, self.answered, 0, self.sampling.max_new_tokens)
        said: list[list[str]] = [[] for _ in self.speakers]
        self.answered += 1
        try:
            with Interrupt() as interrupt:
                answers = [
                    interrupt.between(speaker.answer(prompt, self.sampling, uniforms))
                    for speaker, prompt in zip(self.speakers, prompts, strict=True)
                ]
                if len(answers) == 1:
                    self.display.stream(answers[0], said[0])
                else:
                    self.display.side_by_side([speaker.name for speaker in self.speakers], answers, said)
        finally:
            if any(said):
                self.conversations = [
                    conversation.answered("".join(pieces)) for conversation, pieces in zip(asked, said, strict=True)
                ]

    def _notice_once(self, notice: str) -> None:
        if notice and notice != self._noticed:
            self.display.notice(notice)
        self._noticed = notice

    def _system(self, text: str) -> None:
        self.conversations = [Conversation(system=text, turns=c.turns) for c in self.conversations]

    def _reset(self, _: str) -> None:
        self.conversations = [Conversation(system=c.system) for c in self.conversations]

    def _save(self, name: str) -> None:
        """One file a speaker; those of several speakers are numbered."""
        path = _file(name, "/save")
        for number, conversation in enumerate(self.conversations, 1):
            target = path if len(self.conversations) == 1 else path.with_stem(f"{path.stem}-{number}")
            conversation.save(target)
            self.display.notice(f"saved to {target}")

    def _load(self, name: str) -> None:
        conversation = Conversation.load(_file(name, "/load"))
        self.conversations = [conversation for _ in self.speakers]
        self.display.notice(f"{len(conversation.turns)} turns loaded")

    def _temperature(self, text: str) -> None:
        if text:
            try:
                temperature = float(text)
            except ValueError as error:
                raise ValueError(f"temperature is {text!r}; it must be a number of at least 0") from error
            s = self.sampling
            self.sampling = Sampling(
                max_new_tokens=s.max_new_tokens, temperature=temperature, top_k=s.top_k, top_p=s.top_p
            )
        self.display.notice(f"temperature {self.sampling.temperature:g}")


def _file(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"{command} needs a file's name")
    return Path(name).expanduser()


def _typed_lines() -> Iterator[str]:
    """Lines typed at a terminal, with history and completion of commands; Ctrl-C drops one, Ctrl-D ends."""
    import readline  # only here: importing it writes control codes on some terminals

    names = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]

    def complete(text: str, state: int) -> str | None:
        matches = [name for name in names if text.startswith("/") and name.startswith(text)]
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def chat(config: ChatConfig) -> None:
    """Hold the conversation that the configuration describes.

    Raises ValueError when a checkpoint is missing or unlike its vocabulary, or ``compare`` names only one.
    """
    if len(config.compare) == 1:
        raise ValueError(f"compare = {config.compare[0]}: name two checkpoints, or one with --policy")
    device = find_device(config.device)
    field = "compare" if config.compare else "policy"
    speakers = [
        Speaker.load(path, template=config.template, device=device, field=field)
        for path in config.compare or [config.policy]
    ]
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    terminal = Terminal(speakers, config, Display(interactive=interactive))
    for speaker, conversation in zip(speakers, terminal.conversations, strict=True):
        speaker.prompt(conversation.asked(""), config.max_new_tokens)  # what can't fit is refused at once
    if not interactive:
        terminal.run(line.rstrip("\n") for line in sys.stdin)
        return
    terminal.display.notice(f"{', '.join(speaker.name for speaker in speakers)}; /help lists the commands")
    terminal.run(_typed_lines())

"""The judge itself: a model behind an OpenAI-compatible server, or one in this process; and its answers, kept as they come."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import xxhash

from saebench.files import first_line
from saebench.models import load_model, load_tokenizer
from saebench.runlog import Interrupt

RETRIES = 10
"""of a call that meets a server too busy, failing or not there: from half a second to 8 s apart, or as it says, a minute in all"""
TIMEOUT = 300.0
"""seconds that a call may take"""
_THOUGHTS = 4096  # tokens more for models that think before they answer


class Prompt(NamedTuple):
    """A question, and how many tokens an answer may have."""

    text: str
    limit: int


def is_remote(name: str) -> bool:
    """Whether texts that this judge reads are sent to a server."""
    return _address(name) is not None


def _address(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"(.+?)@(https?://.*)", name)


class Remote:
    """A model on a server that speaks OpenAI's protocol. The key is that of OPENAI_API_KEY, if there is one, and goes to the server alone."""

    def __init__(self, model: str, url: str, concurrency: int) -> None:
        parts = urlsplit(url)
        if not parts.hostname or parts.username or parts.query:
            raise ValueError(
                f"judge {model}@ has a URL that is no address alone; expected MODEL@https://HOST/v1, and a key in OPENAI_API_KEY"
            )
        try:
            import openai
        except ImportError as error:
            raise ValueError(f"judge {model}@{url} needs the openai client: pip install 'saebench[judge]'") from error
        self._failure, self._refusal = openai.OpenAIError, openai.BadRequestError
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=RETRIES, timeout=TIMEOUT
        )
        self._model, self._thinks = model, False
        self.at_once = concurrency
        """calls that it takes side by side"""
        self.identity = {"model": model, "host": parts.netloc}
        """what decides its answers"""
        self.about = f"{model} at {parts.netloc}"
        """in words, and where texts go"""

    def __call__(self, prompt: Prompt) -> str:
        try:
            return self._ask(prompt)
        except self._refusal as error:  # models that think have limits of another name, and no temperature
            if self._thinks or not re.search("max_tokens|temperature", str(error)):
                raise self._told(error) from error
            self._thinks = True
            return self(prompt)
        except self._failure as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> ValueError:
        return ValueError(
            f"judge {self.about} does not answer: {first_line(error)} (a key is taken from OPENAI_API_KEY). "
            "What it has answered is kept: the same command goes on"
        )

    def _ask(self, prompt: Prompt) -> str:
        limits: dict[str, Any] = {"max_tokens": prompt.limit, "temperature": 0.0}
        if self._thinks:
            limits = {"max_completion_tokens": prompt.limit + _THOUGHTS}
        made = self._client.chat.completions.create(
            model=self._model, messages=[{"role": "user", "content": prompt.text}], **limits
        )
        return (made.choices[0].message.content or "") if made.choices else ""


class Local:
    """A chat model in this process, one prompt at a time; it says what it finds most likely."""

    at_once = 1

    def __init__(self, name: str, device: str | None) -> None:
        if getattr(load_tokenizer(name), "chat_template", None) is None:
            raise ValueError(
                f"judge {name} has no chat template: it takes no instructions. Give a chat model, or MODEL@URL"
            )
        self._model = load_model(name, device=device)
        self.identity = {"model": Path(name).resolve().name, "weights": self._model.weights_hash}
        self.about = f"{name} on {self._model.device}"

    @torch.inference_mode()
    def __call__(self, prompt: Prompt) -> str:
        tokenizer = self._model.tokenizer
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self._model.device)
        n_given = given["input_ids"].shape[1]
        if n_given + prompt.limit > self._model.max_context:
            raise ValueError(
                f"a prompt has {n_given} tokens, and judge {self.about} takes {self._model.max_context} with its answer; "
                "ask for less at once, with fewer --examples or --per-call"
            )
        made = self._model.module.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=False, max_new_tokens=prompt.limit,
            eos_token_id=sorted(self._model.end_tokens), pad_token_id=min(self._model.end_tokens, default=0),
        )  # fmt: skip
        return str(tokenizer.decode(made[0, n_given:], skip_special_tokens=True))


Judge = Remote | Local


def open_judge(name: str, device: str | None, concurrency: int) -> Judge:
    """`MODEL@URL`, or the directory of a chat model. Raises ValueError where there is no such judge."""
    address = _address(name)
    return Remote(address[1], address[2], concurrency) if address else Local(name, device)


class Answers:
    """A judge's answers by the hash of what was asked of whom, a line of JSON each. No prompt is kept, and so no text of a store."""

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        """Raises ValueError for a line that is no answer, but for a last one that was cut short."""
        self._path, self._identity = path, json.dumps(identity, sort_keys=True)
        self._known: dict[str, str] = {}
        written = path.read_bytes() if path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[entry["asked"]] = entry["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is no answer: delete it, or the file") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.truncate(len(whole))

    def __contains__(self, prompt: Prompt) -> bool:
        return self._key(prompt) in self._known

    def __getitem__(self, prompt: Prompt) -> str:
        return self._known[self._key(prompt)]

    def add(self, prompt: Prompt, answer: str) -> None:
        """Kept once this returns, even if the process is killed."""
        self._known[self._key(prompt)] = answer
        with open(self._path, "ab") as file:
            file.write(json.dumps({"asked": self._key(prompt), "answer": answer}).encode() + b"\n")

    def _key(self, prompt: Prompt) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps([self._identity, *prompt]).encode())


def ask(
    judge: Judge, answers: Answers, prompts: Iterable[Prompt], interrupt: Interrupt, done: Callable[[int], Any]
) -> bool:
    """Have every prompt answered that is not yet, as many at once as the judge takes; False where Ctrl-C ended it early.

    Answers under way are waited for and kept, also where another one failed, whose error is raised.
    """
    todo = [prompt for prompt in dict.fromkeys(prompts) if prompt not in answers]
    came: SimpleQueue[tuple[Prompt, str | Exception]] = SimpleQueue()

    def call(prompt: Prompt) -> None:
        try:
            came.put((prompt, judge(prompt)))
        except Exception as error:
            came.put((prompt, error))

    running, failed = 0, None
    while running or (todo and not interrupt.requested and failed is None):
        while todo and running < judge.at_once and not interrupt.requested and failed is None:
            # No pool: its threads would be waited for at exit, and the second Ctrl-C is to end a call that hangs.
            threading.Thread(target=call, args=(todo.pop(0),), daemon=True).start()
            running += 1
        prompt, answer = came.get()
        running -= 1
        if isinstance(answer, Exception):
            failed = failed or answer
        else:
            answers.add(prompt, answer)
            done(1)
    if failed is not None:
        raise failed
    return not todo

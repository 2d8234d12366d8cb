"""Text in and text out: what a model reads before it answers, and where its answer ends."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from research.data.chat import chat_template
from research.data.tokenization import Tokenizer
from research.inference.generation import stream
from research.inference.scoring import Scores, pieces, score
from research.training.runs import Trained


class Scored(NamedTuple):
    """Ids that were scored, and their scores."""

    ids: list[int]
    scores: Scores


UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def prompt_ids(trained: Trained, text: str | bytes) -> list[int]:
    """What is read before a continuation of ``text``.

    A model trained here begins with the start token, as its documents did. A published one begins as its tokenizer.json says,
    with the start token alone where that would be nothing.

    Raises:
      ValueError: no text to this tokenizer.
    """
    tokenizer = trained.tokenizer
    if trained.published is None:
        return [tokenizer.start_id, *tokenizer.encode(text).tolist()]
    ids = tokenizer.encode_published(text).tolist() or [tokenizer.start_id]
    # A conversation that a chat template wrote begins with BOS itself.
    return ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids


def chat_ids(trained: Trained, messages: Sequence[Mapping[str, Any]], **values: Any) -> list[int]:
    """A conversation as the model reads it: the ids of ``chat_text``, which holds its own special tokens."""
    return trained.tokenizer.encode(chat_text(trained, messages, **values)).tolist()


def chat_text(trained: Trained, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """A conversation as the model's chat template writes it, up to where the model is to answer.

    Args:
      values: for the template, see ``research.data.chat.ChatTemplate.render``.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    template = chat_template({} if trained.published is None else trained.published["texts"])
    if template is None:
        raise ValueError("the model has no chat template: it must come from a Hugging Face directory that holds one")
    return template.render(messages, **values)


def stop_ids(trained: Trained) -> tuple[int, ...]:
    """Tokens that end an answer: EOS, and of a published model those of its generation_config.json and config.json."""
    told: list[Any] = [trained.tokenizer.eos_id]
    if trained.published is not None:
        generation = json.loads(trained.published["texts"].get("generation_config.json", "{}"))
        for config in (generation, trained.published["config"]):
            ids = config.get("eos_token_id")
            told += ids if isinstance(ids, list) else [ids]
    vocab_size = trained.model.config.vocab_size
    return tuple(sorted({i for i in told if i is not None and 0 <= i < vocab_size}))


def context_length(trained: Trained) -> int:
    """The most tokens that the model was taught to read in a row."""
    published = {} if trained.published is None else trained.published["config"]
    return published.get("max_position_embeddings") or trained.config.data.sequence_length


def score_continuations(
    trained: Trained,
    pairs: Iterable[tuple[str, str]],
    *,
    top: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:
    """Scores of each continuation after its context, as EleutherAI's harness cuts them.

    Both are encoded as one text, spaces at the end of a context belonging to the continuation. A context that is too long
    for the model loses its beginning.
    """
    rows, given, longest = [], [], context_length(trained)
    for context, continuation in pairs:
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        before = prompt_ids(trained, context)
        if context:
            whole = prompt_ids(trained, context + continuation)
        else:
            whole = [*before, *trained.tokenizer.encode(continuation).tolist()]
        first = max(1, min(len(before), len(whole)))
        cut = max(0, min(len(whole) - 1 - longest, first - 1))
        rows.append(whole[cut:])
        given.append(first - cut)
    scores = score(trained.model, rows, given, top=top, batch_size=batch_size, progress=progress)
    return [Scored(row[first:], found) for row, first, found in zip(rows, given, scores, strict=True)]


def score_texts(
    trained: Trained,
    texts: Iterable[str | bytes],
    *,
    overlap: int = 0,
    batch_size: int = 8,
    top: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Scored]]:
    """Scores of every token of each text, from the first on: for each text its pieces.

    A text longer than the model reads is cut, each piece with ``overlap`` tokens of the one before as its context.
    """
    cut = []
    for text in texts:
        ids = trained.tokenizer.encode(text).tolist()
        cut.append(list(pieces([*prompt_ids(trained, b""), *ids], context_length(trained), overlap)))
    flat = [piece for parts in cut for piece in parts]
    options: dict[str, Any] = {"top": top, "batch_size": batch_size, "progress": progress}
    scores = iter(score(trained.model, [ids for ids, _ in flat], [given for _, given in flat], **options))
    return [[Scored(list(ids[given:]), next(scores)) for ids, given in parts] for parts in cut]


def continue_texts(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[str] = (),
    max_new_tokens: int = 256,
    **sampling: Any,
) -> list[str]:
    """The continuation of each prompt (token ids) up to the first of the texts ``stops``, which is left out.

    Decoding ends once every row has ended.
    """
    answers = [Answer(trained.tokenizer, stops, keep=False) for _ in prompts]
    for block in stream(trained.model, prompts, max_new_tokens, stop=stop_ids(trained), **sampling):
        for answer, new in zip(answers, block, strict=True):
            answer.push(new) if new else answer.finish()
        if all(answer.ended for answer in answers):
            break
    for answer in answers:
        answer.finish()
    return [answer.text for answer in answers]


class Answer:
    """The text of one continuation, token by token, cut off at the first of the stop texts: behind it, or before it where
    it is not to be kept."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, keep: bool = True):
        self.text, self.ended = "", False
        self._stream, self._vocab_size, self._keep = tokenizer.stream(), tokenizer.vocab_size, keep
        self._stops = [stop for stop in stops if stop]

    def push(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` add; what is not yet a whole character waits."""
        # A model may have more ids than its tokenizer: those it was never taught.
        return "".join(self._add(self._stream.push(i) if i < self._vocab_size else UNKNOWN) for i in ids)

    def finish(self) -> str:
        """Whatever was still waiting; nothing comes after it."""
        text = self._add(self._stream.finish())
        self.ended = True
        return text

    def _add(self, text: str) -> str:
        if self.ended:
            return ""
        before, whole = len(self.text), self.text + text
        found = [(whole.find(stop, max(0, before - len(stop) + 1)), len(stop)) for stop in self._stops]
        ends = [start + (length if self._keep else 0) for start, length in found if start >= 0]
        if ends:
            self.ended, whole = True, whole[: min(ends)]
        self.text = whole
        return whole[before:]

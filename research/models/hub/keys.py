"""A config.json that remembers which of its keys were read."""

from collections.abc import Mapping
from typing import Any

# Keys without influence on what a loaded model computes: how it was trained, how it is sampled from, who wrote it.
INERT = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout", "hidden_dropout_prob",
    "id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type",
    "name_or_path", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "quantization_config", "resid_pdrop", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "router_z_loss_coef", "sep_token_id", "torch_dtype", "transformers_version",
    "unsloth_version", "use_cache",
}  # fmt: skip


class Keys:
    """The keys of a config.json, or of an object inside it (``path`` names it). A key whose value is null counts as
    absent, but for ``is_null``.

    Problems are gathered; ``check`` raises them all at once.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "", problems: list[str] | None = None):
        self._values, self._path = values, path
        self._read: set[str] = set()
        self._inside: list[Keys] = []
        self._problems: list[str] = [] if problems is None else problems

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        """The value of a key that must be there, which raises ValueError where it is not."""
        self._read.add(name)
        if name not in self:
            raise ValueError("; ".join([*self._problems, f"config.json needs {self._path}{name}"]))
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return self._values[name] if name in self else default

    def either(self, *names: str, default: Any = None) -> Any:
        """The value of the first of several spellings of one key that is there; the others must say the same."""
        given = [(name, self.get(name)) for name in names if name in self]
        for name, value in given[1:]:
            if value != given[0][1]:
                self.refuse(f"{self._path}{given[0][0]} is {given[0][1]!r}, {name} {value!r}: they must be the same")
        if not given and default is None:
            return self[names[0]]
        return given[0][1] if given else default

    def only(self, name: str, *allowed: Any) -> Any:
        """The value of a key of which the model knows the values ``allowed`` alone, the first being what absence means."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            known = " or ".join(repr(a) for a in allowed)
            self.refuse(f"{self._path}{name} must be {known}, got {value!r}")
        return value

    def is_null(self, name: str) -> bool:
        """Whether a key is there and null, where that is another thing than its absence."""
        self._read.add(name)
        return name in self._values and self._values[name] is None

    def inert(self, *names: str) -> None:
        """Marks keys as read that change nothing, in this family."""
        self._read.update(names)

    def inside(self, name: str) -> "Keys":
        """The keys of an object; none where it is absent."""
        self._read.add(name)
        values = self._values.get(name) or {}
        if not isinstance(values, Mapping):
            self.refuse(f"{self._path}{name} must be an object, got {values!r}")
            values = {}
        keys = Keys(values, f"{self._path}{name}.", self._problems)
        self._inside.append(keys)
        return keys

    def refuse(self, problem: str) -> None:
        """Notes a reason why the model cannot be built."""
        self._problems.append(problem)

    def check(self) -> None:
        """Raises ValueError with every problem, and every key that nobody has read or knows to be inert."""
        unread = list(self._unread())
        if unread:
            self._problems.append(f"nothing here reads {', '.join(unread)}")
        if self._problems:
            raise ValueError("config.json: " + "; ".join(self._problems))

    def _unread(self):
        for name in self._values:
            if name not in self._read and (self._path or name not in INERT):
                yield self._path + name
        for keys in self._inside:
            yield from keys._unread()

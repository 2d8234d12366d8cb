"""A tokenizer of whole words for tiny checkpoints, with a chat template, as the files of a Hugging Face directory."""

import json
from pathlib import Path

import tokenizers

WORDS = ("<end>", "in", "the", "beginning", "was", "a", "word", "<user>", "<model>")
TEMPLATE = (
    "{% for m in messages %}<{{ 'model' if m.role == 'assistant' else 'user' }}> {{ m.content }} {% endfor %}<model>"
)


def write_tokenizer(directory: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<end>", "<user>", "<model>"])
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))

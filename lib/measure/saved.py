"""The trained model as a folder that transformers loads: weights, tokenizer, end token, chat template, its record."""

import json

from lib import parameters, paths, record
from lib.data import corpus
from lib.errors import UsageError

# What `lib.data.conversations.as_text` makes of turns; {% %} lines leave no line break behind, so they stand in one.
CHAT_TEMPLATES = {
    "roles": (
        "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "joined": "{% for message in messages %}{% if not loop.first %} {% endif %}{{ message['content'] }}{% endfor %}",
}


def save_model(model, p, result: record.Record) -> str | None:
    """Saves the model of a finished run to the folder `p.save_model`; returns a sentence that says where, or None where
    none is asked for. Raises UsageError where it cannot be written; the record is there all the same."""
    if not p.save_model:
        return None
    folder, tokenizer = paths.from_root(p.save_model), corpus.load_tokenizer(p.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATES[p.turns]
    tokenizer.model_max_length = p.positions
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    about = {
        "record": result.name,
        "attention": p.attention,
        "options": p.options,
        "finished_at": str(result.finished_at),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for of in (model.config, model.generation_config):
            of.eos_token_id = of.bos_token_id = end
        model.generation_config.pad_token_id = end
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        paths.write_whole(folder / parameters.SAVED, json.dumps(about, indent=1) + "\n")
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of safetensors
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"the model cannot be saved to {folder}: {said}; its record is written") from error
    return f"model saved to {folder.resolve()}"

"""Builds a student that shares no tokenizer with the pocket teacher, to distil across vocabularies.

    python scripts/build_stranger.py --out FOLDER --seed 0

A Llama-style transformer of the pocket student's size, trained from scratch on the same tasks, never on a held-out
one. Its tokenizer is of the kind that Llama 2 and Mistral have: `▁` stands for a space and is put before every text,
and what the vocabulary lacks, newlines among it, falls back to bytes. Its chat template is another as well. The same
seed on the same machine gives the same bytes, as with `build_pocket`.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from build_pocket import Dialect, Recipe, build_model, measure, tokenizer_tasks
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
VOCAB_SIZE = 600
# Where SentencePiece cuts before it merges: at a space, which stays with what follows, at a change between letters
# and signs, and around every digit. Newlines are left out, so no piece holds one.
PIECES = Regex(rf"{SPACE}?\p{{L}}+|\d|{SPACE}?[^\p{{L}}\d{SPACE}\n]+|{SPACE}")
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{%- elif message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
# Shares follow DOMAINS; balanced by measurement, as the pocket student's: it knows every format, yet masters no family.
RECIPE = Recipe(
    hidden_size=96,
    num_hidden_layers=2,
    intermediate_size=192,
    num_attention_heads=4,
    shares=(4, 4, 4, 3, 8, 5),
    steps=440,
    model_type="llama",
    architecture="LlamaForCausalLM",
)


def render_prompt(prompt: str) -> str:
    """A user turn, as the chat template renders it; nothing opens the assistant's."""
    return f"{BEGIN}[INST] {prompt} [/INST]"


def train_dialect(seed: int) -> Dialect:
    """A SentencePiece-style BPE tokenizer with byte fallback, learnt from training tasks of all domains.

    The pieces are cut while it learns only: no merge crosses a cut, so that none is needed to encode.
    """
    texts = [text for task in tokenizer_tasks(seed) for text in (f"[INST] {task.prompt} [/INST]", task.reply)]
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Split(PIECES, "removed", invert=True)
    reserved = [UNKNOWN, BEGIN, END, *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(reserved), show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learnt = learner.get_vocab()
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocab = {token: index for index, token in enumerate([*reserved, *sorted(learnt, key=learnt.get)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (UNKNOWN, BEGIN, END)])
    tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, vocab[BEGIN])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = {"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN}
    return Dialect(tokenizer, CHAT_TEMPLATE, render_prompt, specials)


def build(out: Path, seed: int, steps: int, tasks_per_domain: int) -> None:
    """Builds the student into `out`, and measures it on the tasks that `build_pocket` measures on."""
    started = time.perf_counter()
    dialect = train_dialect(seed)
    model = build_model(out, replace(RECIPE, steps=steps), dialect, seed)
    print(f"built in {time.perf_counter() - started:.0f} s", flush=True)
    print(f"exact match {measure(model, dialect, tasks_per_domain, seed)}", flush=True)


def main() -> None:
    """Reads the command line and builds."""
    parser = argparse.ArgumentParser(description="Build a student with a tokenizer of another kind.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks per domain to measure on")
    options = parser.parse_args()
    build(options.out, options.seed, options.steps, options.tasks)


if __name__ == "__main__":
    main()

"""Builds the pocket models from nothing: corpus, tokenizer, teacher, student, prompts and model card.

    python scripts/build_pocket.py --out true_kd/pocket --seed 0

Both models are Qwen3-style transformers that `mlx_lm.load` opens, share one byte-level BPE tokenizer, and train from
scratch on fresh tasks from `pocket_tasks` that are never held out. The same seed on the same machine gives the same
bytes: BLAS runs on one thread, and every random draw has its own seeded generator.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import pocket_tasks
from pocket_tasks import DOMAINS, Task

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import true_kd  # noqa: F401  (before mlx: it loads a fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 768
CORPUS_TASKS_PER_DOMAIN = 2000
PROMPTS_TRAIN, PROMPTS_VALID = 320, 96
MAX_REPLY_TOKENS = 64
LOG_EVERY = 250
CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools: {% for tool in tools %}{% set call = tool.function or tool %}"
    "{{ call.name }}({{ ((call.parameters or {}).properties or {}) | join(', ') }}){{ '.' if loop.last else ', ' }}"
    "{% endfor %}<|im_end|>{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Dialect:
    """How a model is spoken to: its tokenizer and its chat template."""

    tokenizer: Tokenizer
    chat_template: str
    render_prompt: Callable[[str], str]
    """A user turn and the opening of the assistant's, as the chat template renders them."""
    specials: Mapping[str, str]
    """Special tokens as `tokenizer_config.json` names them; `eos_token` ends a turn."""

    def special_id(self, name: str) -> int | None:
        """The id of a special token; None where the dialect has none of this name."""
        return self.tokenizer.token_to_id(self.specials[name]) if name in self.specials else None

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt."""
        return self.tokenizer.encode(self.render_prompt(prompt), add_special_tokens=False).ids

    def encode_reply(self, reply: str) -> list[int]:
        """Token ids of a reply and the end of its turn."""
        return self.tokenizer.encode(f"{reply}{self.specials['eos_token']}", add_special_tokens=False).ids


@dataclass(frozen=True)
class Recipe:
    """The shape of one pocket model, the share of each domain in its corpus, and how long it trains."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    shares: tuple[int, ...]
    steps: int
    batch_size: int = 48
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    model_type: str = "qwen3"
    architecture: str = "Qwen3ForCausalLM"

    def model_config(self, dialect: Dialect) -> dict[str, object]:
        """The `config.json` of the model."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "rms_norm_eps": 1e-6,
            "vocab_size": dialect.tokenizer.get_vocab_size(),
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "bos_token_id": dialect.special_id("bos_token"),
            "eos_token_id": dialect.special_id("eos_token"),
            "pad_token_id": dialect.special_id("pad_token"),
        }


# Shares follow DOMAINS. The student's were balanced by measurement so that it knows every format yet masters no family.
RECIPES = {
    "teacher": Recipe(
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=256,
        num_attention_heads=4,
        shares=(3, 3, 2, 1, 3, 6),
        steps=1600,
    ),
    "student": Recipe(
        hidden_size=96,
        num_hidden_layers=2,
        intermediate_size=192,
        num_attention_heads=4,
        shares=(4, 3, 3, 3, 9, 4),
        steps=360,
    ),
}


def render_prompt(prompt: str) -> str:
    """A user turn and the opening of the assistant's, as the chat template renders them."""
    return f"{TURN_START}user\n{prompt}{TURN_END}{TURN_START}assistant\n"


def tokenizer_tasks(seed: int) -> list[Task]:
    """The training tasks of all domains from whose texts a tokenizer is learnt."""
    rng = random.Random(f"tokenizer {seed}")
    return [
        pocket_tasks.generate_split(domain, rng, held_out=False)
        for _ in range(CORPUS_TASKS_PER_DOMAIN)
        for domain in DOMAINS
    ]


def train_dialect(seed: int) -> Dialect:
    """The pocket models' dialect: a byte-level BPE tokenizer learnt from training tasks of all domains."""
    corpus = [f"{render_prompt(task.prompt)}{task.reply}{TURN_END}" for task in tokenizer_tasks(seed)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return Dialect(tokenizer, CHAT_TEMPLATE, render_prompt, {"eos_token": TURN_END, "pad_token": PAD})


def encode_task(dialect: Dialect, task: Task) -> tuple[list[int], int]:
    """Token ids of a whole exchange, and how many of them are the prompt."""
    prompt = dialect.encode_prompt(task.prompt)
    return prompt + dialect.encode_reply(task.reply), len(prompt)


def training_batches(
    dialect: Dialect, recipe: Recipe, seed: int
) -> Iterator[list[tuple[mx.array, mx.array, mx.array]]]:
    """For each step two half-batches of fresh tasks, the shorter and the longer, to save padding.

    A half-batch is token ids [batch, seq], the flat positions whose next token belongs to a reply, and those tokens.
    """
    rng = random.Random(f"corpus {seed}")
    for _ in range(recipe.steps):
        drawn = []
        for domain in rng.choices(DOMAINS, recipe.shares, k=recipe.batch_size):
            task = pocket_tasks.generate_split(domain, rng, held_out=False)
            drawn.append(encode_task(dialect, task))
        drawn.sort(key=lambda pair: len(pair[0]))
        half = len(drawn) // 2
        yield [collate(drawn[:half]), collate(drawn[half:])]


def collate(encoded: list[tuple[list[int], int]]) -> tuple[mx.array, mx.array, mx.array]:
    """Right-padded inputs, the flat positions to score, and the labels at those positions."""
    width = max(len(ids) for ids, _ in encoded) - 1
    inputs = np.zeros((len(encoded), width), dtype=np.int32)
    positions, labels = [], []
    for row, (ids, prompt_length) in enumerate(encoded):
        inputs[row, : len(ids) - 1] = ids[:-1]
        positions.extend(row * width + column for column in range(prompt_length - 1, len(ids) - 1))
        labels.extend(ids[prompt_length:])
    return mx.array(inputs), mx.array(positions), mx.array(labels)


def reply_loss(model: nn.Module, inputs: mx.array, positions: mx.array, labels: mx.array) -> mx.array:
    """Sum over reply tokens of the cross-entropy in nats; only these positions are ever projected to the vocabulary."""
    hidden = model.model(inputs).reshape(-1, model.args.hidden_size)
    logits = model.model.embed_tokens.as_linear(hidden[positions])
    return nn.losses.cross_entropy(logits, labels, reduction="sum")


def new_model(recipe: Recipe, dialect: Dialect, seed: int) -> nn.Module:
    """A randomly initialised model of the recipe's shape."""
    mx.random.seed(seed)
    family = import_module(f"mlx_lm.models.{recipe.model_type}")
    model = family.Model(family.ModelArgs.from_dict(recipe.model_config(dialect)))
    mx.eval(model.parameters())
    return model


def train(model: nn.Module, recipe: Recipe, dialect: Dialect, seed: int) -> Iterator[float]:
    """Trains with AdamW, warm-up and cosine decay; yields each step's loss in nats per reply token."""
    warmup = optim.linear_schedule(0.0, recipe.learning_rate, recipe.warmup_steps)
    decay = optim.cosine_decay(recipe.learning_rate, recipe.steps - recipe.warmup_steps, recipe.learning_rate / 50)
    schedule = optim.join_schedules([warmup, decay], [recipe.warmup_steps])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01)
    loss_and_gradients = nn.value_and_grad(model, reply_loss)
    for halves in training_batches(dialect, recipe, seed):
        (first_loss, first), (second_loss, second) = (loss_and_gradients(model, *half) for half in halves)
        tokens = sum(labels.size for _, _, labels in halves)
        gradients = tree_map(mx.add, first, second)
        gradients = tree_map(partial(mx.multiply, 1 / tokens), gradients)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        yield (first_loss.item() + second_loss.item()) / tokens


def greedy_replies(model: nn.Module, dialect: Dialect, prompts: list[str], batch_size: int = 32) -> list[str]:
    """Greedy replies in the order of the prompts; prompts of one token length share a batch, so none is padded."""
    encoded = [dialect.encode_prompt(prompt) for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    end = dialect.special_id("eos_token")
    replies = [""] * len(prompts)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            for index, ids in zip(chunk, _decode(model, end, [encoded[i] for i in chunk]), strict=True):
                replies[index] = dialect.tokenizer.decode(ids)
    return replies


def _decode(model: nn.Module, end: int, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of equally long prompts, each cut before its end of turn."""
    cache = make_prompt_cache(model)
    inputs, columns = mx.array(prompts), []
    finished = np.zeros(len(prompts), dtype=bool)
    while not finished.all() and len(columns) < MAX_REPLY_TOKENS:
        chosen = mx.argmax(model(inputs, cache=cache)[:, -1], axis=-1)
        columns.append(np.array(chosen))
        finished |= columns[-1] == end
        inputs = chosen[:, None]
    rows = np.stack(columns, axis=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def exact_match(model: nn.Module, dialect: Dialect, tasks: list[Task]) -> float:
    """The fraction of tasks whose greedy reply passes the check."""
    replies = greedy_replies(model, dialect, [task.prompt for task in tasks])
    return sum(map(pocket_tasks.is_correct, replies, (task.answer for task in tasks))) / len(tasks)


def measure(model: nn.Module, dialect: Dialect, tasks_per_domain: int, seed: int) -> dict[str, float]:
    """Held-out exact match of each domain, on tasks that no model has trained on."""
    accuracy = {}
    for domain in DOMAINS:
        rng = random.Random(f"measure {domain} {seed}")
        tasks = pocket_tasks.generate_unique(domain, rng, tasks_per_domain, held_out=True)
        accuracy[domain] = round(exact_match(model, dialect, tasks), 4)
    return accuracy


def save_model(folder: Path, model: nn.Module, recipe: Recipe, dialect: Dialect) -> None:
    """Writes a folder that `mlx_lm.load` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", recipe.model_config(dialect))
    save_tokenizer(folder, dialect)


def save_tokenizer(folder: Path, dialect: Dialect) -> None:
    """Writes `tokenizer.json`, and the chat template in `tokenizer_config.json`."""
    dialect.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dialect.specials,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": dialect.chat_template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: object) -> None:
    """Writes one JSON document, indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_prompts(folder: Path, seed: int) -> None:
    """Writes `<domain>/train.jsonl` (prompts alone; the teacher replies) and `<domain>/valid.jsonl` (with answers)."""
    for domain in DOMAINS:
        (folder / domain).mkdir(parents=True, exist_ok=True)
        # A stream for each split, so that the size of one does not move the other.
        streams = [random.Random(f"{split} prompts {domain} {seed}") for split in ("train", "valid")]
        train = pocket_tasks.generate_unique(domain, streams[0], PROMPTS_TRAIN, held_out=False)
        valid = pocket_tasks.generate_unique(domain, streams[1], PROMPTS_VALID, held_out=True)
        write_lines(folder / domain / "train.jsonl", [{"prompt": task.prompt} for task in train])
        write_lines(folder / domain / "valid.jsonl", [{"prompt": task.prompt, "answer": task.answer} for task in valid])


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_card(out: Path, parameters: dict[str, int], accuracy: dict[str, dict[str, float]], seed: int) -> None:
    """Writes `README.md`: what the models are, how they were made, and what was measured."""
    rows = "\n".join(
        f"| {domain} | {accuracy['teacher'][domain]:.1%} | {accuracy['student'][domain]:.1%} |" for domain in DOMAINS
    )
    shapes = "\n".join(
        f"- `{name}/`: {parameters[name]:,} parameters, {recipe.num_hidden_layers} layers of width "
        f"{recipe.hidden_size}, {recipe.steps} steps of {recipe.batch_size} tasks"
        for name, recipe in RECIPES.items()
    )
    example = pocket_tasks.generate_split("reflection", random.Random(seed), held_out=True)
    (out / "README.md").write_text(
        f"""# Pocket models

A teacher and a student small enough to ship, trained from scratch on synthetic English tasks in six domains. They
exist to prove that a distillation run works, on any machine and without a download; they know nothing else.

{shapes}

Both are float32 Qwen3-style models that `mlx_lm.load` opens, with one byte-level BPE tokenizer of {VOCAB_SIZE} entries.
The student is smaller and stops early on purpose, so that there is something to distil.

## Measured

Exact match of greedy replies on {accuracy["tasks_per_domain"]} held-out tasks per domain, the same for both:

| domain | teacher | student |
|---|---|---|
{rows}

A reply is right when the text after its last `answer:` (the whole reply if there is none), whitespace collapsed,
equals the answer. Held out is every task whose prompt's SHA-256 (its first 8 bytes as a number) is divisible by
{pocket_tasks.HELD_OUT_ONE_IN}: neither model ever trained on one, and `prompts/*/valid.jsonl` holds nothing else.

An example:

```
{example.prompt}
{example.reply}
```

## Made by

`python scripts/build_pocket.py --seed {seed}`. No text of others was used; licence as the rest of the repository.
""",
        encoding="utf-8",
    )


def build_model(folder: Path, recipe: Recipe, dialect: Dialect, seed: int) -> nn.Module:
    """Trains a model from scratch and writes it into `folder`."""
    model = new_model(recipe, dialect, seed)
    started = time.perf_counter()
    for step, loss in enumerate(train(model, recipe, dialect, seed), 1):
        if step % LOG_EVERY == 0:
            print(f"{folder.name} step {step}: loss {loss:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    save_model(folder, model, recipe, dialect)
    return model


def build(out: Path, seed: int, tasks_per_domain: int) -> None:
    """Builds everything into `out`, measuring both models on the same held-out tasks."""
    dialect = train_dialect(seed)
    parameters: dict[str, int] = {}
    accuracy: dict[str, dict[str, float]] = {"tasks_per_domain": tasks_per_domain}
    for name, recipe in RECIPES.items():
        model = build_model(out / name, recipe, dialect, seed)
        parameters[name] = sum(weight.size for _, weight in tree_flatten(model.parameters()))
        accuracy[name] = measure(model, dialect, tasks_per_domain, seed)
        print(f"{name}: {parameters[name]:,} parameters, exact match {accuracy[name]}", flush=True)
    write_prompts(out / "prompts", seed)
    write_json(out / "accuracy.json", accuracy)
    write_card(out, parameters, accuracy, seed)


def main() -> None:
    """Reads the command line and builds."""
    parser = argparse.ArgumentParser(description="Build the pocket models from nothing.")
    parser.add_argument("--out", type=Path, default=Path("true_kd/pocket"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=500, help="held-out tasks per domain to measure on")
    options = parser.parse_args()
    build(options.out, options.seed, options.tasks)


if __name__ == "__main__":
    main()

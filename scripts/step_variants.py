"""The steps that `bench_step.py` compares, each on the same student and the same tokens.

Peers that have no function for one step are rebuilt from their source, mlx-lm 0.32.2; tests/test_benchmarks.py holds
the step of mlx_lm.lora against its own trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

import true_kd  # noqa: F401 - loads a fast BLAS before mlx

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from true_kd.examples import make_example
from true_kd.losses import LossOptions
from true_kd.models import LoraOptions, add_lora
from true_kd.targets import TargetOptions, encode
from true_kd.training import TrainingOptions, train

VARIANTS = ("lora", "kd", "dense", "dwq", "body")
TEMPERATURE, ALPHA, LEARNING_RATE = 2.0, 0.7, 1e-5
ENCODED = 64
"""Tokens whose targets are made; longer responses repeat them."""

Step = Callable[[], None]
"""Takes one optimizer step; all its results are there when it returns."""


class Bench:
    """The student of one shape, and a step of each variant on the same tokens."""

    def __init__(self, vocab: int, sequence: int, share: float, batch_size: int, hidden: int, layers: int) -> None:
        from mlx_lm.models import qwen3

        self.vocab, self.sequence, self.batch_size, self.hidden = vocab, sequence, batch_size, hidden
        self.dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
        heads = max(1, hidden // 64)
        self._arguments = qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=3 * hidden,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=64,
            rms_norm_eps=1e-6,
            vocab_size=vocab,
            max_position_embeddings=40_960,
            rope_theta=1e6,
            tie_word_embeddings=True,
        )
        self._make = qwen3.Model
        mx.random.seed(0)
        base = self._make(self._arguments)
        base.set_dtype(self.dtype)
        mx.eval(base.parameters())
        self._weights = tree_flatten(base.parameters())
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, vocab, (batch_size, sequence), dtype=np.int32).tolist()
        self.prompt = max(1, round(sequence * (1 - share)))

    def student(self) -> nn.Module:
        """A student on the shared weights with an adapter of its own."""
        module = self._make(self._arguments)
        module.load_weights(list(self._weights))
        mx.random.seed(1)
        add_lora(module, LoraOptions())
        module.train()
        mx.eval(module.parameters())
        return module

    def batches(self) -> Iterator[tuple[mx.array, mx.array]]:
        """The tokens as mlx_lm's trainer pads them, and where each response begins and ends."""
        from mlx_lm.tuner.trainer import iterate_batches

        # A longest length of `sequence` itself would cut the padding, and the steps would compute unlike lengths.
        data = [(tokens, self.prompt) for tokens in self.tokens]
        return iterate_batches(data, self.batch_size, self.sequence + 33, loop=True)

    def step_of(self, variant: str, module: nn.Module) -> Step:
        """The step of a variant."""
        from mlx_lm.tuner.trainer import default_loss

        if variant == "body":
            return self._trainer(module, body_loss, self._normal(self.hidden).astype(self.dtype))
        if variant == "dense":
            return self._trainer(module, dense_loss, self._normal(self.vocab))
        return {"kd": self._kd, "dwq": self._dwq, "lora": partial(self._trainer, loss=default_loss)}[variant](module)

    def _normal(self, width: int) -> mx.array:
        # The trainer pads to 1 more than a multiple of 32, and what it puts in is shorter by the last token.
        values = mx.random.normal((self.batch_size, 32 * -(-self.sequence // 32), width))
        mx.eval(values)
        return values

    def _trainer(self, module: nn.Module, loss: Callable, *targets: mx.array) -> Step:
        """The step inside `mlx_lm.tuner.trainer.train`, which is no function of its own."""
        optimizer = optim.Adam(learning_rate=LEARNING_RATE)
        # It would initialise at the first update: done here, the first trace is that of all steps.
        optimizer.init(module.trainable_parameters())
        differentiate = nn.value_and_grad(module, loss)
        state = [module.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def compiled(batch: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
            (value, tokens), gradient = differentiate(module, *batch)
            optimizer.update(module, nn.average_gradients(gradient))
            return value, tokens

        batches = self.batches()

        def step() -> None:
            value, tokens = compiled((*next(batches), *targets))
            mx.eval(state, value, tokens)
            if mx.get_cache_memory() > 0:  # its `clear_cache_threshold` is 0
                mx.clear_cache()

        return step

    def _dwq(self, module: nn.Module) -> Step:
        """The step inside `mlx_lm.quant.dwq.dwq_quantize` on a LoRA student, its targets read from disk already."""
        from mlx_lm.tuner.losses import kl_div_loss

        targets = self._normal(min(1024, self.vocab))
        ids = mx.random.randint(0, self.vocab, targets.shape, dtype=mx.uint32)
        params = module.trainable_parameters()
        optimizer = optim.Adam(learning_rate=LEARNING_RATE)
        optimizer.init(params)
        mx.eval(ids)

        def loss_of(params: dict, x: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
            module.update(tree_map(lambda leaf: leaf.astype(self.dtype), params))
            logits = mx.take_along_axis(module(x), ids, axis=-1)
            losses = kl_div_loss(logits / TEMPERATURE, targets / TEMPERATURE)
            mask = mx.arange(1, 1 + targets.shape[1]) < lengths[:, 1:]
            return (mask * losses).sum() / mask.sum(), mask.sum()

        batches = self.batches()

        def step() -> None:
            nonlocal params
            batch, lengths = next(batches)
            (loss, tokens), gradient = mx.value_and_grad(loss_of)(params, batch[:, :-1], lengths)
            params = optimizer.apply_gradients(nn.average_gradients(gradient), params)
            mx.eval(loss, tokens, params)

        return step

    def _kd(self, module: nn.Module) -> Step:
        rng = np.random.default_rng(2)
        ranks = np.log(np.arange(1, self.vocab + 1, dtype=np.float32))
        # p ~ rank^-3.8 at temperature 1: some 12 entries per token by the default preset, at any vocabulary.
        logits = mx.array(np.stack([-3.8 * rng.permutation(ranks) for _ in range(ENCODED)]))
        labels = mx.argmax(logits, axis=-1).astype(mx.int32)
        few = encode(logits, labels, rng.random(ENCODED), TargetOptions().settings)
        longest, length = self.sequence, self.sequence - self.prompt
        spread = np.arange(length) % ENCODED
        targets, response = few.take(spread), np.array(labels)[spread]
        examples = [
            make_example(tokens[: self.prompt], response, targets, np.arange(length), "bench", longest)
            for tokens in self.tokens
        ]
        options = TrainingOptions(
            iters=10**6,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup=0.0,
            batch_size=self.batch_size,
            max_seq_length=longest,
        )
        steps = train(module, examples, options, LossOptions(temperature=TEMPERATURE, alpha=ALPHA), 0)
        return lambda: next(steps) and None


def body_loss(model: nn.Module, batch: mx.array, lengths: mx.array, slope: mx.array) -> tuple[mx.array, mx.array]:
    """A loss whose gradient at the states that enter the head is `slope`."""
    return mx.sum(model.model(batch[:, :-1]) * slope).astype(mx.float32), lengths.sum()


def dense_loss(model: nn.Module, batch: mx.array, lengths: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
    """KD and CE on full logits, by mlx_lm's own KL and masked as its trainer masks."""
    from mlx_lm.tuner.losses import kl_div_loss

    logits = model(batch[:, :-1]).astype(mx.float32)
    places = mx.arange(1, logits.shape[1] + 1)
    mask = mx.logical_and(places >= lengths[:, 0:1], places <= lengths[:, 1:])
    kd = TEMPERATURE**2 * kl_div_loss(logits / TEMPERATURE, mx.stop_gradient(teacher) / TEMPERATURE)
    ce = nn.losses.cross_entropy(logits, batch[:, 1:])
    # Once: MLX 0.32.4 fails to compile a gradient that gives back what it has computed twice (`_Map_base::at`).
    count = mask.sum()
    return ((ALPHA * kd + (1 - ALPHA) * ce) * mask).sum() / count, count

"""What capturing costs beyond the teacher's own generation: seconds with and without it, interleaved in one run.

Both sides write the same replies through the same code; one of them also thins the distribution at every token and
writes the cache. Shown is the median over rounds of the ratio of their times.

    python scripts/bench_capture.py                          # the pocket teacher, and a wide one of random weights
    python scripts/bench_capture.py --model mlx-community/Qwen2.5-7B-Instruct-4bit --domain thinking
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

import true_kd  # noqa: F401 - loads a fast BLAS before mlx
from true_kd import jobs, pocket
from true_kd.cache import CacheIdentity, TargetCache
from true_kd.capture import CaptureOptions, TeacherPrompt, capture, render_for
from true_kd.examples import Rendered
from true_kd.models import LanguageModel, ModelOptions, generate_replies, open_model, seed_of
from true_kd.targets import Preset, TargetOptions


def wide_teacher(vocab: int, width: int, layers: int) -> LanguageModel:
    """A Qwen2 of random weights whose output is about as sure as a trained model's."""
    import mlx.core as mx
    from mlx_lm.models import qwen2

    mx.random.seed(0)
    arguments = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        rms_norm_eps=1e-6,
        vocab_size=vocab,
        tie_word_embeddings=False,
    )
    module = qwen2.Model(arguments)
    # Logits with a standard deviation of 4: over 151,936 ids, an entropy of about 4 nats at temperature 1.
    module.lm_head.weight = mx.random.normal(module.lm_head.weight.shape) * (4 / width**0.5)
    module.set_dtype(mx.float32 if mx.default_device() == mx.cpu else mx.float16)
    module.eval()
    mx.eval(module.parameters())
    tokenizer = type("Tokenizer", (), {"eos_token_ids": {vocab - 1}})()
    return LanguageModel(f"random Qwen2, {width} wide", tokenizer, vocab, "0", module)


def time_generation(teacher: LanguageModel, prompts: Sequence[TeacherPrompt], options: CaptureOptions) -> float:
    """Seconds that the replies alone take, by the calls that `capture` makes."""
    start = time.perf_counter()
    seeds = [seed_of(f"{options.seed} {prompt.key}") for prompt in prompts]
    for _ in generate_replies(teacher, [prompt.rendered.prompt for prompt in prompts], options, seeds):
        pass
    return time.perf_counter() - start


def time_capture(
    teacher: LanguageModel, prompts: Sequence[TeacherPrompt], options: CaptureOptions, preset: Preset
) -> tuple[float, int]:
    """Seconds that the replies and their targets take, cache files included, and the number of tokens."""
    with tempfile.TemporaryDirectory() as root:
        cache = TargetCache(Path(root), CacheIdentity({"bench": preset}))
        start = time.perf_counter()
        tokens = 0
        for progress in capture(teacher, prompts, cache, options, TargetOptions(preset=preset).settings):
            tokens = progress.tokens
        return time.perf_counter() - start, tokens


def compare(
    teacher: LanguageModel,
    prompts: Sequence[TeacherPrompt],
    options: CaptureOptions,
    presets: list[Preset],
    rounds: int,
) -> None:
    """Print a row per preset."""
    ratios: dict[Preset, list[float]] = {preset: [] for preset in presets}
    rates = []
    time_generation(teacher, prompts[: options.batch_size], options)
    for _ in range(rounds):
        for preset in presets:
            alone = time_generation(teacher, prompts, options)
            both, tokens = time_capture(teacher, prompts, options, preset)
            ratios[preset].append(both / alone)
            rates.append(tokens / alone)
    shape = f"{len(prompts)} replies of up to {options.max_tokens} tokens, batch {options.batch_size}"
    sampling = f"sampling temperature {options.sampling_temperature:g}, top_p {options.top_p:g}"
    print(f"\n{teacher.name}, {teacher.size:,} ids: {shape}, {sampling}; {statistics.median(rates):,.0f} tok/s alone")
    print("| preset | time with capture / without | rounds |\n|---|---|---|")
    for preset, found in ratios.items():
        low, high = min(found), max(found)
        print(f"| {preset} | {statistics.median(found):.3f} ({low:.3f} to {high:.3f}) | {rounds} |", flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket:teacher")
    parser.add_argument("--config", type=Path, default=Path(pocket.BASE), help="Whose prompts the model answers.")
    parser.add_argument("--domain", default="thinking")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--presets", nargs="*", default=["tiny", "default", "hot"], choices=get_args(Preset))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--greedy", action="store_true", help="Sampling temperature 0, the cheapest generation.")
    parser.add_argument("--wide", nargs=3, type=int, default=(151_936, 512, 8), metavar=("VOCAB", "WIDTH", "LAYERS"))
    parser.add_argument("--no-wide", action="store_true", help="Leave out the model of random weights.")
    arguments = parser.parse_args()
    options = CaptureOptions(
        max_tokens=arguments.max_tokens,
        batch_size=arguments.batch_size,
        sampling_temperature=0.0 if arguments.greedy else 0.7,
    )
    teacher = open_model(ModelOptions(model=arguments.model), "teacher")
    planned, failures = jobs.plan(arguments.config, [arguments.domain], [])
    if failures:
        jobs.refuse(failures)
    prompts = render_for(teacher, planned[0].train_prompts[: arguments.prompts], options)
    compare(teacher, prompts, options, arguments.presets, arguments.rounds)
    if not arguments.no_wide:
        wide = wide_teacher(*arguments.wide)
        rng = np.random.default_rng(0)
        few = options.model_copy(update={"max_tokens": min(16, options.max_tokens)})
        random = [TeacherPrompt(Rendered(rng.integers(0, 1000, 8).tolist(), None), f"{n:032x}") for n in range(32)]
        compare(wide, random, few, arguments.presets, arguments.rounds)


if __name__ == "__main__":
    main()

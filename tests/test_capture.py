"""The teacher's targets are its own distribution at its own tokens, and each prompt is asked once, come what may."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_shards import assert_same

from true_kd import events, pipeline, pocket
from true_kd.cache import ABOUT, IDENTITY, TargetCache
from true_kd.capture import (
    CaptureOptions,
    CaptureProgress,
    TeacherPrompt,
    capture,
    render_for,
    teacher_identity,
)
from true_kd.errors import ModelError
from true_kd.jobs import Job, plan
from true_kd.manifest import HEAD, MANIFEST, read_manifest
from true_kd.models import LanguageModel, ModelOptions, load_head, open_model, uniforms_of
from true_kd.prompts import Prompt, from_records, from_strings
from true_kd.shards import CachedReply
from true_kd.targets import HiddenTargets, TargetOptions, TargetSettings, TeacherHead, encode
from true_kd.targets.values import logprob_codes

GREEDY = CaptureOptions(sampling_temperature=0.0, max_tokens=12)
SAMPLED = CaptureOptions(sampling_temperature=1.0, top_p=0.9, max_tokens=12)
TARGETS = TargetOptions().settings
EXACT = TargetOptions(preset="exact").settings
ASKED = from_strings([f"say hello to {name}" for name in ("the cat", "the mat", "the world", "said", "5 cats on mats")])
GIVEN = from_records(
    [
        {"prompt": "where is the cat", "completion": "the cat sat on the mat"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to the world"}]},
        {"text": "the cat sat on the mat and said hello"},
    ]
)
LONG = from_records([{"text": "the cat sat on the mat and said hello " * 40}])


@pytest.fixture(scope="session")
def terse_folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The random teacher, made to end its replies soon: every eighth id is a stop token."""
    folder = tmp_path_factory.mktemp("terse")
    for file in teacher_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, *range(8, 320, 8)]}))
    return folder


@pytest.fixture
def terse(terse_folder: Path) -> LanguageModel:
    return open_model(ModelOptions(model=str(terse_folder)), "teacher")


def ask(
    teacher: LanguageModel,
    prompts: list[Prompt],
    root: Path,
    options: CaptureOptions = GREEDY,
    settings: TargetSettings = TARGETS,
) -> tuple[list[CachedReply], list[CaptureProgress], TargetCache]:
    """The replies to the prompts, in order, and what the capture reported."""
    cache = TargetCache(root, teacher_identity(teacher, settings))
    asked = render_for(teacher, prompts, options)
    progress = list(capture(teacher, asked, cache, options, settings))
    # Opened anew, so that what is looked at has been on disk.
    cache = TargetCache(root, teacher_identity(teacher, settings))
    head = TeacherHead(load_head(cache.head_path)) if cache.head_path else None
    found = cache.read(dict.fromkeys(prompt.key for prompt in asked), head)
    return [found[prompt.key] for prompt in asked], progress, cache


def forced(teacher: LanguageModel, asked: TeacherPrompt, reply: CachedReply) -> np.ndarray:
    """The teacher's logits at each token of a reply, from one pass over prompt and reply; float64."""
    prompt = asked.rendered.prompt
    logits = teacher.module(mx.array([prompt + reply.tokens.tolist()]))[0, len(prompt) - 1 : -1]
    return np.array(logits.astype(mx.float32)).astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_targets_are_forced(
    teacher: LanguageModel,
    prompts: list[Prompt],
    root: Path,
    options: CaptureOptions,
    settings: TargetSettings = TARGETS,
) -> None:
    replies, _, _ = ask(teacher, prompts, root, options, settings)
    for asked, reply in zip(render_for(teacher, prompts, options), replies, strict=True):
        logits = forced(teacher, asked, reply)
        expected = log_softmax(logits)
        softened = np.exp(log_softmax(logits / settings.draw_temperature))
        targets = reply.targets
        assert reply.kept.tolist() == list(range(len(reply.tokens)))
        assert len(targets) == len(reply.tokens) == len(expected)
        assert targets.labels.tolist() == reply.tokens.tolist()
        for row in range(len(reply.tokens)):
            entries = slice(targets.offsets[row], targets.offsets[row + 1])
            ids, exact = targets.ids[entries], targets.exact[entries]
            # One step of the code: what the rounding of another batch may cost.
            off = targets.logprob_codes[entries].astype(int) - logprob_codes(expected[row, ids], exact)
            assert np.abs(off[exact]).max() <= 1
            assert np.abs(off[~exact]).max(initial=0) <= 4
            least = 1.02 * settings.threshold
            assert set(np.flatnonzero((np.exp(expected[row]) > least) | (softened[row] > least))) <= set(ids[exact])
            assert len(set(ids[exact])) == exact.sum()
            outside = 1.0 - softened[row, ids[exact]].sum()
            assert targets.tail_mass(settings.draw_temperature)[row] == pytest.approx(outside, rel=0.05, abs=2e-4)
        weights, _ = targets.at_temperature(settings.draw_temperature)
        # Of a tail smaller than the threshold one id stands for all of the threshold, or none for nothing.
        np.testing.assert_allclose(np.add.reduceat(weights, targets.offsets[:-1]), 1.0, atol=settings.threshold + 0.02)


def assert_near(found: CachedReply, expected: CachedReply) -> None:
    """The same reply and targets, but for what the rounding of another batch may change."""
    assert (found.finished, found.tokens.tolist()) == (expected.finished, expected.tokens.tolist())
    assert found.kept.tolist() == expected.kept.tolist()
    one, other = found.targets, expected.targets
    starts = (one.offsets[:-1], other.offsets[:-1])
    codes = [targets.logprob_codes[at].astype(int) for targets, at in zip((one, other), starts, strict=True)]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    np.testing.assert_allclose(one.tail_mass(1.0), other.tail_mass(1.0), atol=0.05)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a cache but for the one that says when it was made."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "about.json"}


def test_greedy_replies_are_those_of_mlx_lm(terse: LanguageModel, tmp_path: Path) -> None:
    from mlx_lm.generate import stream_generate

    replies, _, _ = ask(terse, ASKED, tmp_path)
    ends = set()
    for asked, reply in zip(render_for(terse, ASKED, GREEDY), replies, strict=True):
        written = list(
            stream_generate(terse.module, terse.tokenizer, asked.rendered.prompt, max_tokens=GREEDY.max_tokens)
        )
        assert reply.tokens.tolist() == [response.token for response in written]
        assert reply.finished == written[-1].finish_reason
        ends.add(reply.finished)
    assert ends == {"stop", "length"}, "these prompts no longer show both ways to end"


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_reply_ends_with_its_stop_token_or_at_max_tokens(
    terse: LanguageModel, tmp_path: Path, options: CaptureOptions
) -> None:
    replies, _, _ = ask(terse, ASKED, tmp_path, options)
    for reply in replies:
        stops = [token in terse.stop_ids for token in reply.tokens.tolist()]
        assert not any(stops[:-1])
        if reply.finished == "stop":
            assert stops[-1]
        else:
            assert reply.finished == "length"
            assert len(reply.tokens) == options.max_tokens


def test_a_given_completion_is_kept_and_ends_with_a_stop_token(teacher: LanguageModel, tmp_path: Path) -> None:
    replies, _, _ = ask(teacher, GIVEN[:2], tmp_path)
    for reply, text in zip(replies, ("the cat sat on the mat", "hello to the world"), strict=True):
        assert reply.finished == "given"
        assert reply.tokens[-1] in teacher.stop_ids
        assert teacher.tokenizer.decode(reply.tokens[:-1].tolist()) == text


def test_of_a_text_every_token_but_the_first_is_scored(teacher: LanguageModel, tmp_path: Path) -> None:
    [reply], _, _ = ask(teacher, GIVEN[2:], tmp_path)
    assert reply.tokens.tolist() == teacher.tokenizer.encode(GIVEN[2].text)[1:]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_targets_of_written_replies_are_the_teachers_forced_distribution(
    terse: LanguageModel, tmp_path: Path, options: CaptureOptions
) -> None:
    assert_targets_are_forced(terse, ASKED, tmp_path, options)


@pytest.mark.parametrize("preset", ["tiny", "default", "hot"])
def test_targets_are_the_teachers_forced_distribution_with_every_preset(
    terse: LanguageModel, tmp_path: Path, preset: str
) -> None:
    settings = TargetOptions(preset=preset).settings
    assert_targets_are_forced(terse, [*ASKED, *GIVEN], tmp_path, SAMPLED, settings)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_token_is_sampled_from_a_place_of_its_own(
    terse: LanguageModel, tmp_path: Path, options: CaptureOptions
) -> None:
    """The draws are those of `encode` with uniforms that follow from the key, token by token."""
    prompts = [*ASKED, *GIVEN, *LONG]
    replies, _, _ = ask(terse, prompts, tmp_path, options)
    same, rows = 0, 0
    for asked, reply in zip(render_for(terse, prompts, options), replies, strict=True):
        logits = mx.array(forced(terse, asked, reply).astype(np.float32))
        uniforms = uniforms_of(asked.key, len(reply.tokens))
        expected = encode(logits, mx.array(reply.tokens), uniforms, TARGETS)
        for row in range(len(reply.tokens)):
            one, other = (targets.take(np.array([row])) for targets in (reply.targets, expected))
            same += one.ids.tolist() == other.ids.tolist()
        rows += len(reply.tokens)
    # The rounding of another batch moves a draw now and then.
    assert same > 0.9 * rows


def test_a_long_given_reply_is_scored_to_its_end(teacher: LanguageModel, tmp_path: Path) -> None:
    assert_targets_are_forced(teacher, LONG, tmp_path, GREEDY)
    [reply], _, _ = ask(teacher, LONG, tmp_path)
    assert len(reply.tokens) > 256, "shorter than a chunk of scoring"


@pytest.fixture
def soft_capped(tmp_path: Path, tokenizer_folder: Path) -> LanguageModel:
    """A random Gemma 2, whose head does more than one linear map."""
    from mlx_lm.models import gemma2

    config = {
        "model_type": "gemma2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "query_pre_attn_scalar": 16,
        "eos_token_id": 1,
    }
    folder = tmp_path / "gemma2"
    folder.mkdir()
    mx.random.seed(3)
    module = gemma2.Model(gemma2.ModelArgs.from_dict(config))
    module.model.embed_tokens.weight = 30 * module.model.embed_tokens.weight
    module.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    return open_model(ModelOptions(model=str(folder)), "teacher")


def test_a_soft_capped_teacher_is_scored_as_it_speaks(soft_capped: LanguageModel, tmp_path: Path) -> None:
    one_by_one = GREEDY.model_copy(update={"batch_size": 1})
    assert_targets_are_forced(soft_capped, [*ASKED[:3], *GIVEN], tmp_path / "cache", one_by_one)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_soft_capped_teacher_is_scored_as_it_speaks_in_batches(
    soft_capped: LanguageModel, tmp_path: Path, batch_size: int
) -> None:
    batched = GREEDY.model_copy(update={"batch_size": batch_size})
    assert_targets_are_forced(soft_capped, ASKED[-batch_size:], tmp_path / "cache", batched)


def test_a_reply_does_not_depend_on_its_neighbours(terse: LanguageModel, tmp_path: Path) -> None:
    together, _, _ = ask(terse, ASKED, tmp_path / "together", SAMPLED)
    for index, prompt in enumerate(ASKED):
        [alone], _, _ = ask(terse, [prompt], tmp_path / f"alone {index}", SAMPLED)
        assert_near(together[index], alone)


def test_a_given_reply_does_not_depend_on_its_neighbours(terse: LanguageModel, tmp_path: Path) -> None:
    together, _, _ = ask(terse, [*ASKED, *GIVEN], tmp_path / "together", SAMPLED)
    for index, prompt in enumerate(GIVEN):
        [alone], _, _ = ask(terse, [prompt], tmp_path / f"alone {index}", GREEDY)
        assert_same(together[len(ASKED) + index], alone)


def test_a_reply_that_is_written_alone_is_the_same_to_the_bit(terse: LanguageModel, tmp_path: Path) -> None:
    one_by_one = SAMPLED.model_copy(update={"batch_size": 1})
    together, _, _ = ask(terse, ASKED, tmp_path / "together", one_by_one)
    for index, prompt in enumerate(ASKED):
        [alone], _, _ = ask(terse, [prompt], tmp_path / f"alone {index}", one_by_one)
        assert_same(together[index], alone)


def test_replies_are_whole_though_they_outlast_what_is_encoded_at_once(teacher: LanguageModel, tmp_path: Path) -> None:
    """Logits of 256 tokens are encoded at a time, whichever replies they belong to."""
    options = CaptureOptions(sampling_temperature=0.0, max_tokens=70)
    assert_targets_are_forced(teacher, ASKED, tmp_path, options)
    replies, _, _ = ask(teacher, ASKED, tmp_path, options)
    assert sum(len(reply.tokens) for reply in replies) > 256, "these prompts no longer make long replies"


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"shard_prompts": 2}, {"batch_size": 1, "shard_prompts": 3}])
def test_the_grouping_of_prompts_changes_nothing(terse: LanguageModel, tmp_path: Path, change: dict) -> None:
    grouped = SAMPLED.model_copy(update=change)
    expected, _, _ = ask(terse, ASKED, tmp_path / "one", SAMPLED)
    found, _, _ = ask(terse, list(reversed(ASKED)), tmp_path / "other", grouped)
    for one, other in zip(expected, reversed(found), strict=True):
        assert_near(other, one)
    _, [reused], _ = ask(terse, ASKED, tmp_path / "one", grouped)
    assert (reused.done, reused.tokens) == (len(ASKED), 0)


def test_what_only_the_writing_knows_does_not_ask_again_for_given_replies(terse: LanguageModel, tmp_path: Path) -> None:
    ask(terse, [*ASKED, *GIVEN], tmp_path, SAMPLED)
    _, progress, _ = ask(terse, [*ASKED, *GIVEN], tmp_path, GREEDY)
    assert progress[0].done == len(GIVEN)


@pytest.mark.parametrize("change", [{"sampling_temperature": 1e-4}, {"top_p": 1e-4}], ids=lambda change: str(*change))
def test_sampling_without_freedom_takes_the_most_likely_token(
    terse: LanguageModel, tmp_path: Path, change: dict
) -> None:
    greedy, _, _ = ask(terse, ASKED, tmp_path)
    bound, _, _ = ask(terse, ASKED, tmp_path, SAMPLED.model_copy(update=change))
    assert [reply.tokens.tolist() for reply in bound] == [reply.tokens.tolist() for reply in greedy]


def test_another_capture_seed_gives_other_samples(terse: LanguageModel, tmp_path: Path) -> None:
    one, _, _ = ask(terse, ASKED, tmp_path, SAMPLED)
    other, _, _ = ask(terse, ASKED, tmp_path, SAMPLED.model_copy(update={"seed": 1}))
    assert [reply.tokens.tolist() for reply in one] != [reply.tokens.tolist() for reply in other]


def test_the_same_seed_gives_the_same_files(terse: LanguageModel, tmp_path: Path) -> None:
    _, _, one = ask(terse, [*ASKED, *GIVEN], tmp_path / "one", SAMPLED)
    mx.random.seed(123)
    _, _, other = ask(terse, [*ASKED, *GIVEN], tmp_path / "other", SAMPLED)
    assert contents(one.folder) == contents(other.folder)


def test_a_second_capture_does_nothing(terse: LanguageModel, tmp_path: Path) -> None:
    _, _, cache = ask(terse, [*ASKED, *GIVEN], tmp_path)
    before = contents(cache.folder)
    _, progress, _ = ask(terse, [*ASKED, *GIVEN], tmp_path)
    assert [(at.done, at.total, at.tokens) for at in progress] == [(8, 8, 0)]
    assert contents(cache.folder) == before


def test_an_edited_prompt_captures_only_itself(terse: LanguageModel, tmp_path: Path) -> None:
    ask(terse, ASKED, tmp_path)
    edited = [*ASKED[:2], *from_strings(["say hello to the cat!"]), *ASKED[3:]]
    replies, progress, _ = ask(terse, edited, tmp_path)
    assert progress[0].done == len(ASKED) - 1
    assert progress[-1].tokens == len(replies[2].tokens)


def test_an_added_prompt_captures_only_itself(terse: LanguageModel, tmp_path: Path) -> None:
    before, _, _ = ask(terse, [*ASKED[:2], *GIVEN], tmp_path)
    replies, progress, _ = ask(terse, [ASKED[3], *reversed(GIVEN), *ASKED[:2]], tmp_path)
    assert (progress[0].done, progress[0].total) == (5, 6)
    assert progress[-1].tokens == len(replies[0].tokens)
    for one, other in zip([*replies[-2:], *reversed(replies[1:4])], before, strict=True):
        assert_same(one, other)


def test_replies_of_a_damaged_shard_are_captured_again_as_they_were(terse: LanguageModel, tmp_path: Path) -> None:
    options = GREEDY.model_copy(update={"shard_prompts": 2})
    _, _, cache = ask(terse, ASKED, tmp_path, options)
    before = {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")}
    assert len(before) == 3
    damaged = cache.folder / sorted(before)[0]
    damaged.write_bytes(bytes(len(before[damaged.name])))
    _, progress, _ = ask(terse, ASKED, tmp_path, options)
    assert progress[0].done in (3, 4)
    assert {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")} == before


def test_a_stopped_capture_keeps_its_finished_shards(terse: LanguageModel, tmp_path: Path) -> None:
    options = GREEDY.model_copy(update={"shard_prompts": 2})
    cache = TargetCache(tmp_path, teacher_identity(terse, TARGETS))
    asked = render_for(terse, ASKED, options)
    for progress in capture(terse, asked, cache, options, TARGETS):
        if progress.done == 3:
            break
    reopened = TargetCache(tmp_path, cache.identity)
    assert sum(prompt.key in reopened for prompt in asked) == 2


@pytest.mark.parametrize("shard_prompts", [1, 3, 64])
def test_shards_are_written_as_they_fill(terse: LanguageModel, tmp_path: Path, shard_prompts: int) -> None:
    options = SAMPLED.model_copy(update={"shard_prompts": shard_prompts, "batch_size": 2})
    cache = TargetCache(tmp_path, teacher_identity(terse, TARGETS))
    asked = render_for(terse, [*ASKED, *GIVEN], options)
    for progress in capture(terse, asked, cache, options, TARGETS):
        on_disk = sum(file.replies for file in read_manifest(cache.folder).values())
        # The last shard is written with its last reply, though it is not full.
        assert on_disk == (progress.done if progress.done == 8 else progress.done // shard_prompts * shard_prompts)
    files = read_manifest(cache.folder).values()
    assert [file.replies for file in files] == [shard_prompts] * (8 // shard_prompts) + [8 % shard_prompts] * (
        8 % shard_prompts > 0
    )
    assert sum(file.tokens for file in files) == progress.tokens


def test_progress_rises_to_the_number_of_different_prompts(terse: LanguageModel, tmp_path: Path) -> None:
    options = SAMPLED.model_copy(update={"shard_prompts": 3})
    replies, progress, _ = ask(terse, [*ASKED, *GIVEN, *ASKED], tmp_path, options)
    done = [at.done for at in progress]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 8)
    assert {at.total for at in progress} == {8}
    assert progress[-1].tokens == sum(len(reply.tokens) for reply in replies[:8])


def test_prompts_of_two_domains_share_their_replies(terse: LanguageModel, tmp_path: Path) -> None:
    ask(terse, ASKED[:3], tmp_path)
    _, progress, _ = ask(terse, ASKED[1:], tmp_path)
    assert progress[0].done == 2


# Hidden states


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_hidden_states_give_back_every_logit(
    terse: LanguageModel, tmp_path: Path, options: CaptureOptions, temperature: float
) -> None:
    replies, _, cache = ask(terse, [*ASKED, *GIVEN], tmp_path, options, EXACT)
    assert cache.head_path is not None
    for asked, reply in zip(render_for(terse, [*ASKED, *GIVEN], options), replies, strict=True):
        assert isinstance(reply.targets, HiddenTargets)
        assert isinstance(reply.targets.states, np.memmap)
        assert reply.targets.states.shape == (len(reply.tokens), 48)
        expected = log_softmax(forced(terse, asked, reply) / temperature)
        found = np.array(reply.targets.head.logprobs(mx.array(reply.targets.states), temperature))
        # States have 11 bits; logits of this teacher reach 30.
        np.testing.assert_allclose(found, expected, atol=0.03 / temperature)


def test_hidden_states_change_nothing_of_the_text(terse: LanguageModel, tmp_path: Path) -> None:
    sparse, _, _ = ask(terse, [*ASKED, *GIVEN], tmp_path, SAMPLED)
    hidden, _, _ = ask(terse, [*ASKED, *GIVEN], tmp_path, SAMPLED, EXACT)
    for one, other in zip(sparse, hidden, strict=True):
        assert (one.finished, one.tokens.tolist()) == (other.finished, other.tokens.tolist())


@pytest.mark.parametrize("dequantize", ["never", "always"])
def test_hidden_states_of_a_quantised_teacher_give_back_every_logit(
    quantised_folder: Path, tmp_path: Path, dequantize: str
) -> None:
    quantised = open_model(ModelOptions(model=str(quantised_folder), dequantize=dequantize), "teacher")
    replies, _, cache = ask(quantised, [*ASKED, *GIVEN], tmp_path, GREEDY, EXACT)
    stored = mx.load(str(cache.head_path))
    assert ("scales" in stored) is (dequantize == "never")
    for asked, reply in zip(render_for(quantised, [*ASKED, *GIVEN], GREEDY), replies, strict=True):
        expected = log_softmax(forced(quantised, asked, reply))
        found = np.array(reply.targets.head.logprobs(mx.array(reply.targets.states), 1.0))
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_a_quantised_teacher_and_the_same_one_unpacked_share_a_cache(quantised_folder: Path, tmp_path: Path) -> None:
    packed, unpacked = (
        open_model(ModelOptions(model=str(quantised_folder), dequantize=choice), "teacher")
        for choice in ("never", "always")
    )
    before, _, _ = ask(packed, ASKED, tmp_path, GREEDY, EXACT)
    after, [progress], _ = ask(unpacked, ASKED, tmp_path, GREEDY, EXACT)
    assert (progress.done, progress.tokens) == (len(ASKED), 0)
    for one, other in zip(before, after, strict=True):
        assert_same(one, other)


def test_a_soft_capped_teacher_has_no_hidden_states_to_keep(soft_capped: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"more than the linear map of model.embed_tokens \(soft-capping or scaling\)"):
        ask(soft_capped, ASKED, tmp_path / "cache", GREEDY, EXACT)
    assert not (tmp_path / "cache").exists()


def test_hidden_states_that_overflow_are_refused(teacher: LanguageModel, tmp_path: Path) -> None:
    teacher.module.model.norm.weight = 1e5 * teacher.module.model.norm.weight
    with pytest.raises(ModelError, match="overflows 16 bits"):
        ask(teacher, GIVEN, tmp_path, GREEDY, EXACT)
    assert ask(teacher, GIVEN, tmp_path, GREEDY)[1][-1].done == len(GIVEN), "the others do as the message says"


def test_a_head_that_is_gone_is_written_again_with_the_next_capture(terse: LanguageModel, tmp_path: Path) -> None:
    _, _, cache = ask(terse, ASKED[:2], tmp_path, GREEDY, EXACT)
    before = (cache.folder / HEAD).read_bytes()
    (cache.folder / HEAD).unlink()
    ask(terse, ASKED[:3], tmp_path, GREEDY, EXACT)
    assert (cache.folder / HEAD).read_bytes() == before


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_head_that_is_damaged_is_written_again_though_no_reply_is_missing(
    terse: LanguageModel, tmp_path: Path, damage: str
) -> None:
    _, _, cache = ask(terse, ASKED[:2], tmp_path, GREEDY, EXACT)
    before = (cache.folder / HEAD).read_bytes()
    if damage == "gone":
        (cache.folder / HEAD).unlink()
    else:
        (cache.folder / HEAD).write_bytes(before[:-1])
    _, progress, _ = ask(terse, ASKED[:2], tmp_path, GREEDY, EXACT)
    assert progress[-1].tokens == 0
    assert (cache.folder / HEAD).read_bytes() == before


# A share of the tokens


@pytest.mark.parametrize("share", [0.01, 0.3, 0.75])
@pytest.mark.parametrize("kind", ["sparse", "hidden"])
def test_a_share_keeps_the_tokens_of_the_highest_entropy(
    terse: LanguageModel, tmp_path: Path, kind: str, share: float
) -> None:
    exact = {"preset": "exact"} if kind == "hidden" else {"threshold": 0.001}
    some, every = TargetOptions(share=share, **exact).settings, TargetOptions(**exact).settings
    prompts = [*ASKED, *GIVEN]
    one_by_one = SAMPLED.model_copy(update={"batch_size": 1})
    whole, _, _ = ask(terse, prompts, tmp_path, one_by_one, every)
    replies, _, _ = ask(terse, prompts, tmp_path, one_by_one, some)
    for asked, reply, full in zip(render_for(terse, prompts, one_by_one), replies, whole, strict=True):
        assert (reply.finished, reply.tokens.tolist()) == (full.finished, full.tokens.tolist())
        assert len(reply.kept) == len(reply.targets) == max(1, round(share * len(reply.tokens)))
        assert (np.diff(reply.kept) > 0).all()
        logprobs = log_softmax(forced(terse, asked, reply))
        entropies = -(np.exp(logprobs) * logprobs).sum(axis=-1)
        dropped = np.setdiff1d(np.arange(len(reply.tokens)), reply.kept)
        # Sparse targets know the entropy from what they keep, whose log-probabilities are rounded to a byte.
        slack = 0.1 if kind == "sparse" else 1e-3
        assert entropies[reply.kept].min() > entropies[dropped].max(initial=-1.0) - slack
        assert_same(
            CachedReply(reply.tokens, reply.finished, reply.targets, reply.kept),
            CachedReply(full.tokens, full.finished, full.targets.take(reply.kept), reply.kept),
        )


# Kills, and several processes at once

WORK = """
import os, signal, sys
from pathlib import Path
from true_kd import events
from true_kd.jobs import plan
from true_kd.pipeline import capture

base, domain, replies, steps, renames = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])

def count(event, arguments):
    global renames
    if event == "os.rename" and str(arguments[1]).endswith(".safetensors"):
        if renames == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        renames -= 1

sys.addaudithook(count)
told = False
for event in capture(*plan(base, [domain], [])):
    if isinstance(event, (events.TeacherOpening, events.TeacherBusy)) and not told:
        told = True
        print("ready", flush=True)
        sys.stdin.readline()
    if isinstance(event, events.DomainFailed):
        sys.exit(event.trace)
    if isinstance(event, events.Captured) and event.progress.done >= replies:
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps -= 1
"""
"""Captures a domain. Dies by SIGKILL some decoding steps after so many replies, or before it names so many shards."""

NEVER = 10**9


@dataclass
class Place:
    """Prompts of the pocket models, and a cache for the replies of their teacher."""

    root: Path
    prompts: Sequence[str]
    capture: dict[str, Any]

    def write(self, domain: str, prompts: Sequence[str], **capture: Any) -> None:
        """A domain, and how its prompts are captured."""
        folder = self.root / "prompts" / domain
        folder.mkdir(parents=True)
        for split, lines in (("train", prompts[:-4]), ("valid", prompts[-4:])):
            (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
        (self.root / f"{domain}.yaml").write_text(json.dumps({"capture": {**self.capture, **capture}}))

    def base(self, cache: str) -> Path:
        """The config of runs with a certain cache."""
        path = self.root / f"{cache} base.yaml"
        places = {"prompts": str(self.root / "prompts"), "cache": str(self.root / cache)}
        # The process that is killed is the one that captures.
        models = {"teacher": "pocket:teacher", "student": "pocket:student", "isolate": False}
        path.write_text(json.dumps({**models, **places}))
        return path

    def start(self, cache: str, domain: str, replies: int = NEVER, steps: int = 0, renames: int = NEVER) -> Any:
        """A process that captures a domain, as soon as it is told so."""
        arguments = [sys.executable, "-c", WORK, str(self.base(cache)), domain, *map(str, (replies, steps, renames))]
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def capture_here(self, cache: str, domain: str) -> tuple[list[CaptureProgress], Job]:
        """Capture a domain in this process; what was reported, and the job, whose targets are then known."""
        jobs, failures = plan(self.base(cache), [domain], [])
        seen = list(pipeline.capture(jobs, failures))
        assert seen[-1].failures == {}
        [job] = jobs
        return [event.progress for event in seen if isinstance(event, events.Captured)], job

    def replies(self, job: Job) -> dict[str, CachedReply]:
        """All replies of a captured job, read from a cache that is opened anew."""
        cache = TargetCache(job.targets.cache.folder.parent, job.targets.cache.identity)
        return cache.read([prompt.key for prompt in (*job.targets.train, *job.targets.valid)])


def let_go(processes: Sequence[Any]) -> list[int]:
    """Let processes begin, all at once, and wait for them; how they ended."""
    for process in processes:
        assert process.stdout.readline() == b"ready\n", process.communicate()[1].decode()
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=100) for process in processes]
    codes = [process.returncode for process in processes]
    assert set(codes) <= {0, -signal.SIGKILL}, [error.decode() for _, error in ends]
    return codes


@pytest.fixture
def pocket_place(tmp_path: Path) -> Place:
    lines = (pocket.locate("pocket:prompts", "prompts") / "task" / "train.jsonl").read_text().splitlines()
    return Place(tmp_path, lines, {"shard_prompts": 8, "batch_size": 3, "max_tokens": 6})


def check_files(folder: Path) -> None:
    """Every file of a cache is whole, and in the manifest."""
    files = read_manifest(folder)
    for name, file in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == file.sha256
    assert {path.name for path in folder.glob("[!.]*")} - {MANIFEST, IDENTITY, ABOUT} == set(files)


KILLS = {
    "after a burst of replies": ({"replies": 17, "steps": 3}, 16),
    "before its second shard has a name": ({"renames": 1}, 24),
    "before its last reply": ({"replies": 43}, 40),
}
"""Where a capture of 44 replies, 8 in a shard, is killed time and again, and how many replies are left of it."""


@pytest.mark.slow
def test_a_capture_that_is_killed_again_and_again_ends_as_if_it_had_not_been(pocket_place: Place) -> None:
    place = pocket_place
    place.write("task", place.prompts[:44])
    _, undisturbed = place.capture_here("undisturbed", "task")
    expected = place.replies(undisturbed)
    identity = undisturbed.targets.cache.identity
    folder = place.root / "killed" / identity.folder_name
    finished: dict[str, tuple[int, int]] = {}
    for kill, left in KILLS.values():
        assert let_go([place.start("killed", "task", **kill)]) == [-signal.SIGKILL]
        cache = TargetCache(folder.parent, identity)
        found = [key for key in expected if key in cache]
        assert len(found) == left
        for key, reply in cache.read(found).items():
            assert_same(reply, expected[key])
        status = {name: (folder / name).stat() for name in read_manifest(folder)}
        written = {name: (file.st_ino, file.st_mtime_ns) for name, file in status.items()}
        assert finished.items() <= written.items(), "a finished shard was written again"
        finished = written
    progress, job = place.capture_here("killed", "task")
    assert (progress[0].done, progress[-1].done) == (40, 44)
    assert progress[-1].tokens == sum(
        file.tokens for name, file in read_manifest(folder).items() if name not in finished
    )
    check_files(folder)
    for key, reply in place.replies(job).items():
        assert_same(reply, expected[key])


@pytest.mark.slow
def test_processes_that_want_the_same_teacher_ask_it_once_for_each_reply(pocket_place: Place) -> None:
    place = pocket_place
    several = {"batch_size": 8, "shard_prompts": 4}
    place.write("one", place.prompts[:32], **several)
    place.write("overlapping", place.prompts[16:48][::-1], **{**several, "batch_size": 5})
    processes = [place.start("shared", domain) for domain in ("one", "one", "overlapping")]
    expected: dict[str, CachedReply] = {}
    for domain in ("one", "overlapping"):
        expected |= place.replies(place.capture_here("undisturbed", domain)[1])
    assert len(expected) == 48
    assert let_go(processes) == [0, 0, 0]
    [folder] = (path for path in (place.root / "shared").iterdir() if path.is_dir())
    check_files(folder)
    assert sum(file.replies for file in read_manifest(folder).values()) == 48
    assert not list(folder.glob(".tmp*"))
    for domain in ("one", "overlapping"):
        progress, job = place.capture_here("shared", domain)
        assert progress == [], "something was missing"
        for key, reply in place.replies(job).items():
            assert_near(reply, expected[key])


def test_a_process_that_stops_in_the_middle_leaves_the_lock_free(terse: LanguageModel, tmp_path: Path) -> None:
    cache = TargetCache(tmp_path, teacher_identity(terse, TARGETS))
    options = GREEDY.model_copy(update={"shard_prompts": 1})
    running: Iterator[CaptureProgress] = capture(terse, render_for(terse, ASKED, options), cache, options, TARGETS)
    while next(running).done < 2:
        pass
    assert ask(terse, ASKED, tmp_path, options)[1][0].done == 2
    running.close()

"""What a pair of tokenizers shares, and which options have a meaning for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from conftest import save_random_model
from mlx_lm.utils import load_tokenizer

from true_kd.alignment import Aligner, pair
from true_kd.errors import InputError, VocabularyError
from true_kd.losses import LossOptions
from true_kd.models import ModelOptions
from true_kd.targets import TargetOptions

STUDENT = ModelOptions(model="a-student")


def test_models_of_one_tokenizer_need_no_alignment() -> None:
    one = zoo.opened("gpt2", None)
    found = pair(one, one, STUDENT, "auto", force=False)
    assert found.alignment is None
    assert found.vocabulary.differing == 0
    found.check(TargetOptions(preset="exact"), LossOptions())


def test_targets_of_a_pair_are_in_the_students_ids() -> None:
    teacher, student = zoo.opened("gpt2", None), zoo.opened("llama", None)
    found = pair(teacher, student, STUDENT, "auto", force=False)
    assert found.alignment.way == "align"
    assert found.alignment.student == STUDENT
    assert found.vocabulary.ids.tolist() == list(range(student.size))
    assert found.vocabulary.differing > 0


def test_what_a_cache_is_known_by_depends_on_the_tokenizer_and_the_way() -> None:
    teacher = zoo.opened("gpt2", None)
    found = {
        (name, way): pair(teacher, zoo.opened(name, None), STUDENT, way, force=True).alignment.facts
        for name in ("llama", "mistral")
        for way in ("align", "project", "uld", "truncate")
    }
    assert len({json.dumps(facts) for facts in found.values()}) == 8
    elsewhere = ModelOptions(model="elsewhere", revision="other")
    again = pair(teacher, zoo.opened("llama", None), elsewhere, "align", force=False)
    assert again.alignment.facts == found["llama", "align"], "where the student lies is no part of it"


@pytest.mark.parametrize("way", ["align", "project", "uld", "truncate"])
def test_hidden_states_go_with_no_way_of_mapping(way: str) -> None:
    found = pair(zoo.opened("gpt2", None), zoo.opened("llama", None), STUDENT, way, force=True)
    losses = LossOptions(divergence="total_variation")
    with pytest.raises(InputError, match=rf"targets\.preset exact: .* vocab_strategy {way} can map"):
        found.check(TargetOptions(preset="exact"), losses)
    found.check(TargetOptions(), losses)


def test_cross_entropy_alone_may_have_any_divergence() -> None:
    found = pair(zoo.opened("gpt2", None), zoo.opened("llama", None), STUDENT, "uld", force=False)
    found.check(TargetOptions(), LossOptions(alpha=0.0))
    with pytest.raises(InputError, match="expected total_variation"):
        found.check(TargetOptions(), LossOptions())


def test_students_of_one_tokenizer_that_end_replies_otherwise_share_no_cache() -> None:
    teacher, student = zoo.opened("gpt2", None), zoo.opened("llama", None)
    other = replace(student, tokenizer=load_tokenizer(zoo.folder_of("llama")))
    other.tokenizer._eos_token_ids = set(student.tokenizer.eos_token_ids) | {0}
    digests = [pair(teacher, each, STUDENT, "align", force=False).alignment.tokenizer for each in (student, other)]
    assert len(set(digests)) == 2


def test_tokens_beyond_the_head_of_a_model_are_left_out_of_the_students_and_refused_of_the_teachers() -> None:
    whole = zoo.opened("llama", None)
    last = max(index for index, piece in enumerate(zoo.spelled("llama").pieces) if piece)
    text = zoo.spelled("llama").pieces[last].decode()
    small = replace(whole, size=last)
    teacher = zoo.opened("gpt2", None)
    response = zoo.spelled("gpt2").encode(f"hello{text} to the world".encode(), continues=True)
    found = Aligner("align", teacher, small).retell(response, [])
    assert max(found.ours) < last
    with pytest.raises(VocabularyError, match="of its output head"):
        Aligner("align", small, teacher).retell([last], [])


def test_shared_tokens_are_those_of_one_spelling() -> None:
    teacher, student = zoo.opened("gpt2", None), zoo.opened("llama", None)
    aligner = Aligner("align", teacher, student)
    found = aligner.compatibility
    theirs, ours = (
        {piece for piece in each.pieces if piece} for each in (aligner.teacher_spelling, aligner.student_spelling)
    )
    assert (found.teacher_tokens, found.student_tokens) == (len(theirs), len(ours))
    assert 0 < found.shared == len(theirs & ours) < len(theirs)


def test_a_tokenizer_shares_all_its_tokens_with_itself() -> None:
    one = zoo.opened("llama", None)
    found = Aligner("align", one, one).compatibility
    assert found.teacher_tokens == found.student_tokens == found.shared


def test_analyze_tells_how_two_tokenizers_go_together(tmp_path: Path, monkeypatch, capsys) -> None:
    from true_kd.cli import proving

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts" / "a").mkdir(parents=True)
    for split in ("train", "valid"):
        lines = [{"prompt": f"hi {number}", "completion": "the cat said hello"} for number in range(6)]
        (tmp_path / "prompts" / "a" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    teacher = save_random_model(tmp_path / "teacher", zoo.folder_of("gpt2"), seed=1, vocab_size=800)
    student = save_random_model(tmp_path / "student", zoo.folder_of("llama"), seed=2, vocab_size=800)
    (tmp_path / "base.yaml").write_text(f"teacher: {teacher}\nstudent: {student}\ncache: cache\nisolate: false\n")
    code = proving.analyze(domain=["a"], config=Path("base.yaml"), sample=4, as_json=True)
    told = json.loads(capsys.readouterr().out)["tokenizers"]["a"]
    assert code == 0
    assert told["way"] == "align"
    assert 0 < told["shared"] < told["teacher_tokens"]
    assert told["positions"] == 1.0
    ways = ("matched", "split", "chained", "drawn", "merged", "nowhere")
    assert sum(told[way] for way in ways) == pytest.approx(1.0, abs=0.01)
    proving.analyze(domain=["a"], config=Path("base.yaml"), sample=4)
    said = capsys.readouterr().out
    assert f"a: {told['shared']:,} tokens are in both vocabularies" in said
    assert "align: targets at 100% of the student's tokens" in said
